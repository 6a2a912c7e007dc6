"""Off costs nothing: our library without a flag against unpatched llama.cpp, prompt and decode.

    python bench/off_is_stock.py --model MODEL.gguf [--turns 90] [--prompt 256] [--tokens 64]
    python bench/off_is_stock.py --model MODEL.gguf --flags="--dynamic-layers --async-prefetch"

With --flags: what a feature costs where it has nothing to do.

Both programs stay loaded and take short turns, so that a machine whose speed wanders shows the same face to both; who
begins changes from pair to pair. Prints a Markdown row for each: medians of both, and the median of the pairwise
ratios with its 95 % confidence interval.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from statistics import median

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import programs  # noqa: E402
from bench.turns import TurnTaker  # noqa: E402

REST_S = 0.05  # until the threads of the program whose turn is over sleep


class Program:
    """A probe that decodes the same prompt at every turn."""

    def __init__(self, name: str, args: argparse.Namespace, flags: str = "") -> None:
        command = [programs.find(name), "-m", args.model, "--n-prompt", args.prompt, "-n", args.tokens]
        command += ["-t", args.threads, "-c", args.prompt + args.tokens + 8, "--turns", 1, "--repack", args.repack]
        command += shlex.split(flags)
        self.program = TurnTaker(command)
        self.seen: list[dict[str, float]] = []
        self.hashes: list[str] = []

    def turn(self) -> None:
        out = json.loads(self.program.ask())
        self.seen.append({"prompt": out["n_prompt"] / out["prompt_s"], "decode": len(out["tokens"]) / out["decode_s"]})
        self.hashes.append(out["hash"])
        time.sleep(REST_S)

    def close(self) -> None:
        self.program.close()


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % confidence interval of the median, by resampling."""
    samples = np.random.default_rng(0).choice(ratios, size=(4000, len(ratios)))
    low, high = np.quantile(np.median(samples, axis=1), [0.025, 0.975])
    return float(low), float(high)


def take_turns(first: Program, second: Program, turns: int) -> bool:
    """Fills `seen` of both; the first turn of each only warms up. Returns whether all logits were the same."""
    for i in range(turns + 1):
        for program in (first, second) if i % 2 == 0 else (second, first):
            program.turn()
    for program in (first, second):
        program.close()
        del program.seen[0]
    return len(set(first.hashes + second.hashes)) == 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--turns", type=int, default=90)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repack", type=int, default=1, help="of both: 1 is llama.cpp's default")
    parser.add_argument("--flags", default="", help="of ours")
    args = parser.parse_args()

    stock, ours = Program("probe-stock", args), Program("probe", args, args.flags)
    same = take_turns(stock, ours, args.turns)
    print(f"| model | turns | what | stock | ours, {args.flags or 'no flag'} | ratio (95 %) | logits |")
    print("|---|---|---|---|---|---|---|")
    for what in ("prompt", "decode"):
        pairs = [(a[what], b[what]) for a, b in zip(stock.seen, ours.seen, strict=True)]
        ratios = [b / a for a, b in pairs]
        low, high = interval(ratios)
        print(
            f"| {args.model.name} | {args.turns} | {what} | {median(a for a, _ in pairs):.1f} tok/s "
            f"| {median(b for _, b in pairs):.1f} tok/s | {median(ratios):.4f} ({low:.4f}-{high:.4f}) "
            f"| {'identical' if same else 'DIFFERENT'} |"
        )
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
