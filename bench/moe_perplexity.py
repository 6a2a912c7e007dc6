"""The perplexity of a text for each way in which a card computes a mixture of experts.

    python -m bench.moe_perplexity --model MODEL.gguf --text FILE [--tokens 700] [--share 75] [--link 0.4] [--threads N]

Tokens are decoded one by one, as an answer is: prompts do not ask banks. *all*: `-ngl 99`. *host*: `-ngl 99 -cmoe`.
*send* and *share*: dynamic layers with --share percent of the card's memory that all would take, and `--expert-misses
send` or `share`, as if the way to the card had --link of the memory's speed. A process for each. What is sent should
have the perplexity of *all* to the last digit; the others may differ in the last ones.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from superllama._memory import n_physical_cores

WAYS = ("all", "host", "send", "share")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """In a process of its own."""
    import superllama

    def opened(**params: Any) -> tuple[superllama.Model, superllama.Context]:
        model = superllama.Model(args.model, progress=False, **params)
        return model, superllama.Context(model, n_ctx=args.tokens, n_batch=1, n_threads=args.threads)

    if args.way == "all":
        model, context = opened(n_gpu_layers=99)
    elif args.way == "host":
        model, context = opened(n_gpu_layers=99, override_tensor={"exps": "CPU"})
    else:
        model, context = opened(dynamic_layers=True)
        context.decode([0])
        budget = context.metrics().vram_own_bytes * args.share // 100
        context.close()
        model.close()
        model, context = opened(dynamic_layers=True, vram_budget=budget, expert_misses=args.way)
    tokens = model.tokenize(args.text.read_text())[: args.tokens]
    scores = [scored.logprob for scored in context.score(tokens)]
    m = context.metrics()
    return {
        "perplexity": math.exp(-sum(scores) / len(scores)),
        "there": m.expert_device_hits,
        "sent": m.expert_device_misses - m.expert_host_computed,
        "computed": m.expert_host_computed,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=700)
    parser.add_argument("--share", type=int, default=75)
    parser.add_argument("--link", type=float, default=0.4)
    parser.add_argument("--threads", type=int, default=n_physical_cores())
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        print(json.dumps(run(args)))
        return 0
    print("| computed by | perplexity | experts there | sent | computed by the host |\n|---|---:|---:|---:|---:|")
    for way in WAYS:
        experts = f"{args.link:g}" if way == "share" else "send"
        done = subprocess.run(
            [sys.executable, "-m", "bench.moe_perplexity", *sys.argv[1:], "--way", way],
            env={**os.environ, "SUPERLLAMA_EXPERTS": experts},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            print(f"moe_perplexity: {way}: {done.stderr.strip()[-500:]}", file=sys.stderr)
            return 1
        r = json.loads(done.stdout.splitlines()[-1])
        print(f"| {way} | {r['perplexity']:.4f} | {r['there']} | {r['sent']} | {r['computed']} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
