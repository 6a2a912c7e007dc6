#!/usr/bin/env python3
"""Speculation by n-grams with less memory than the model needs: where several tokens share one pass over the weights.

bench/speculation.py MODEL.gguf [--budget 50] [--tokens 96] [--out FOLDER]

llama-server answers one prompt whose continuation repeats what is there, and one that does not, without and with
speculation, greedily. Prints tokens/s, also as a share of the plain bound B / (S - M), accepted drafts, and whether the
tokens stay the same. What is drafted depends on what the model writes: take a real one (bench/widen_model.py).
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import bound, disk_speed, page_cache, programs
from bench.job import HEADROOM
from bench.pressure import pressure
from bench.run_one import Model
from bench.undo import Journal

MODES = {
    "plain": [],
    "--spec-default": ["--spec-default"],
    "ngram-simple": [
        "--spec-type",
        "ngram-simple",
        "--spec-ngram-simple-size-n",
        "4",
        "--spec-ngram-simple-size-m",
        "16",
    ],
}
CODE = Path(__file__).with_name("sizes.py").read_text()
TEXTS = {
    "repeats": f"The file sizes.py:\n\n{CODE}\n\nThe file sizes.py once more, with one name changed:\n\n{CODE[:400]}",
    "does not": "Nobody in the village could say why the lighthouse had been dark that night, and the keeper",
}


def ask(url: str, prompt: str, tokens: int, timeout: float) -> dict:
    body = {"prompt": prompt, "n_predict": tokens, "temperature": 0, "ignore_eos": True, "return_tokens": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/completion", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=timeout) as answer:
        return json.load(answer)


def run(a: argparse.Namespace, prompt: str, mode: str, budget: int | None) -> dict:
    """One answer of a fresh server, cold cache."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [str(programs.find("llama-server", a.build)), "-m", str(a.model), "--port", str(port), "-c", "1024"]
    command += ["-ub", "128", "-np", "1", "-t", str(a.threads), "--no-warmup", "--no-repack", *MODES[mode]]
    command += ["--dynamic-layers", "--async-prefetch"] if budget else []
    command += ["--mem-budget", str(budget)] if budget else []
    page_cache.evict(a.model)
    with Journal() as journal, pressure(journal, budget and budget + 4 * HEADROOM, "cgroup") as p:
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=p.enter)
        with journal.process(child):
            url = f"http://127.0.0.1:{port}"
            while True:
                try:
                    urllib.request.urlopen(f"{url}/health", timeout=5).read()
                    break
                except OSError:
                    if child.poll() is not None:
                        raise RuntimeError(f"llama-server ended with {child.returncode}: {' '.join(command)}") from None
                    time.sleep(0.1)
            answer = ask(url, prompt, a.tokens, a.timeout)
            child.terminate()
            child.wait()
    t = answer["timings"]
    return {"mode": mode, "tokens_per_s": t["predicted_per_second"], "drafted": t.get("draft_n", 0),
            "accepted": t.get("draft_n_accepted", 0), "tokens": answer["tokens"]}  # fmt: skip


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--budget", type=int, default=50, help="percent of the model's size")
    p.add_argument("--tokens", type=int, default=96)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--timeout", type=float, default=600)
    p.add_argument("--out", type=Path, default=Path("results-speculation"))
    p.add_argument("--build", type=Path)
    a = p.parse_args()
    try:
        where = Model.open(a.model).where
        budget = a.model.stat().st_size * a.budget // 100
        compute = run(a, TEXTS["does not"], "plain", None)["tokens_per_s"]
        speed = disk_speed.measure(a.model).bytes_per_s
        results = {text: [run(a, prompt, mode, budget) for mode in MODES] for text, prompt in TEXTS.items()}
    except (RuntimeError, OSError) as error:
        print(f"speculation: {error}", file=sys.stderr)
        return 1
    limits = bound.Limits(bound.needed_bytes(where), bound.expert_bytes(where), speed, compute)
    plain = None if limits.moe else limits.dense(budget)
    a.out.mkdir(parents=True, exist_ok=True)
    (a.out / "speculation.json").write_text(json.dumps({"bound": plain, "results": results}, indent=1) + "\n")
    print("| continuation | mode | tokens/s | of plain | of the bound | drafted, accepted | tokens |")
    print("|---|---|---|---|---|---|---|")
    for text, rows in results.items():
        for r in rows:
            same = "the same" if r["tokens"] == rows[0]["tokens"] else "DIFFERENT"
            of_bound = f"{r['tokens_per_s'] / plain:.2f}" if plain else ""
            gain = r["tokens_per_s"] / rows[0]["tokens_per_s"]
            print(f"| {text} | {r['mode']} | {r['tokens_per_s']:.2f} | {gain:.2f} "
                  f"| {of_bound} | {r['drafted']}, {r['accepted']} | {same} |")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
