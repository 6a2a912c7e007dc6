"""Off costs nothing: our library without a flag against unpatched llama.cpp, alternating, prompt and decode.

    python bench/off_is_stock.py --model MODEL.gguf [--runs 9] [--prompt 512] [--tokens 128]

Prints a Markdown row: medians of both and the median of the ratios of neighbouring runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import programs  # noqa: E402


def run(program: Path, args: argparse.Namespace) -> dict[str, float | str]:
    command = [program, "-m", args.model, "--n-prompt", args.prompt, "-n", args.tokens, "-t", args.threads]
    command += ["-c", args.prompt + args.tokens + 8]
    done = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True)
    out = json.loads(done.stdout)
    return {
        "prompt": out["n_prompt"] / out["prompt_s"],
        "decode": len(out["tokens"]) / out["decode_s"],
        "hash": out["hash"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    found: dict[str, list[dict[str, float | str]]] = {"stock": [], "ours": []}
    for i in range(args.runs + 1):
        order = ["stock", "ours"] if i % 2 == 0 else ["ours", "stock"]
        for engine in order:
            result = run(programs.find("probe-stock" if engine == "stock" else "probe"), args)
            if i > 0:  # the first pair warms up
                found[engine].append(result)
    same = len({str(r["hash"]) for rs in found.values() for r in rs}) == 1
    print("| model | runs | what | stock | ours, no flag | ratio | logits |")
    print("|---|---|---|---|---|---|---|")
    for what in ("prompt", "decode"):
        stock = [float(r[what]) for r in found["stock"]]
        ours = [float(r[what]) for r in found["ours"]]
        ratio = statistics.median(b / a for a, b in zip(stock, ours, strict=True))
        print(
            f"| {args.model.name} | {args.runs} | {what} | {statistics.median(stock):.1f} tok/s "
            f"| {statistics.median(ours):.1f} tok/s | {ratio:.3f} | {'identical' if same else 'DIFFERENT'} |"
        )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
