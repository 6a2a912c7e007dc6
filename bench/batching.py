#!/usr/bin/env python3
"""Several sequences in one pass over the weights: LLM.generate() of a list against one prompt, with weights that
stream; and against llama-server with the same requests, everything in memory.

bench/batching.py MODEL.gguf [--share 0.5] [--sequences 8] [--tokens 32] [--rounds 3]

Each measurement is a process of its own, and they take turns. Prints tokens per second, and ratios by round.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

PROMPTS = [f"{word} and then it was said that" for word in ("One", "Two", "Red", "Blue", "He", "She", "We", "They")]
CELLS = 256  # of a sequence


def through_llm(model: str, n: int, n_slots: int, tokens: int, budget: int | None) -> float:
    """Tokens per second of n sequences, with their prompts; after a short one that brings everything up."""
    import superllama

    options = {"mem_budget": budget, "async_prefetch": True} if budget else {"dynamic_layers": False}
    with superllama.LLM(model, n_ctx=CELLS * n_slots, n_parallel=n_slots, **options) as llm:
        llm.generate("warm", max_tokens=2)
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(n)]
        begin = time.perf_counter()
        found = llm.generate(prompts, max_tokens=tokens, temperature=0, ignore_eos=True, cache_prompt=False)
        return sum(c.usage.generated_tokens for c in found) / (time.perf_counter() - begin)


def through_server(model: str, n: int, n_slots: int, tokens: int) -> float:
    """The same by as many clients of superllama-server."""
    import superllama

    with superllama.Server(model, n_ctx=CELLS * n_slots, n_parallel=n_slots, dynamic_layers=False) as server:

        def ask(prompt: str, tokens: int = tokens) -> int:
            body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "cache_prompt": False}
            headers = {"Authorization": f"Bearer {server.api_key}", "Content-Type": "application/json"}
            url = f"http://{server.host}:{server.port}/completion"
            with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as answer:
                return int(json.load(answer)["tokens_predicted"])

        ask("warm", 2)
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(n)]
        begin = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(n) as pool:
            return sum(pool.map(ask, prompts)) / (time.perf_counter() - begin)


def measured(kind: str, a: argparse.Namespace) -> float:
    """The number that this program prints when it is run for one measurement."""
    command = [sys.executable, __file__, a.model, "--one", kind]
    for name in ("share", "sequences", "tokens"):
        command += [f"--{name}", str(getattr(a, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{kind}: {done.stderr[-1000:]}")
    return float(done.stdout.split()[-1])


def one(kind: str, a: argparse.Namespace) -> float:
    n = a.sequences
    if kind == "server":
        return through_server(a.model, n, n, a.tokens)
    if kind == "memory":
        return through_llm(a.model, n, n, a.tokens, None)
    budget = int(Path(a.model).stat().st_size * a.share)
    return through_llm(a.model, 1 if kind == "streamed-one" else n, n, a.tokens, budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--share", type=float, default=0.5, help="of the model's bytes, as the budget")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="of each sequence")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.one:
        print(one(a.one, a))
        return
    kinds = ["streamed-one", "streamed-all", "memory", "server"]
    rounds = [{kind: measured(kind, a) for kind in kinds} for _ in range(a.rounds)]
    print("| measurement | tokens/s by round | median |\n|---|---|---|")
    for kind in kinds:
        values = [r[kind] for r in rounds]
        print(f"| {kind} | {', '.join(f'{v:.2f}' for v in values)} | {statistics.median(values):.2f} |")
    for above, below in (("streamed-all", "streamed-one"), ("memory", "server")):
        ratios = [r[above] / r[below] for r in rounds]
        print(f"| {above} / {below} | {', '.join(f'{v:.2f}' for v in ratios)} | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
