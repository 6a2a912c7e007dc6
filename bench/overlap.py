"""How much reading and computing slow each other down: what a machine can give when both go on at once.

    python bench/overlap.py --model MODEL.gguf [--turns 8] [--tokens 16] [--repack 0]

The model lies in memory as superllama keeps it and decodes, in turns alone and beside direct reads of the file by
another process, as fast as they come. Nothing is streamed: what is lost here no scheduler can win back. Prints the
medians of decode speed and of B, each alone and beside the other.
"""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import disk_speed
from bench.off_is_stock import Program, interval

READ_BYTES = 1 << 30


class Reads:
    """Reads a file again and again, in threads of this process."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.speeds: list[float] = []  # bytes per second of READ_BYTES each
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.work)

    def work(self) -> None:
        while not self.stop.is_set():
            speed = disk_speed.measure(self.path, threads=6, n_bytes=READ_BYTES).bytes_per_s
            if not self.stop.is_set():  # else a part of it was alone
                self.speeds.append(speed)

    def __enter__(self) -> Reads:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--read", type=Path, help="the file that is read; default: the model's")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repack", type=int, default=1)
    args = parser.parse_args()

    path = args.read or args.model
    program = Program("probe", args, "--dynamic-layers --async-prefetch")
    program.turn()
    program.seen.clear()
    alone, beside = [], []
    for _ in range(args.turns):
        alone.append(disk_speed.measure(path, threads=6, n_bytes=READ_BYTES).bytes_per_s)
        program.turn()
        with Reads(path) as reads:
            program.turn()
        beside += reads.speeds
    program.close()

    decode = [turn["decode"] for turn in program.seen]
    print("| what | alone | beside the other | ratio (95 %) |\n|---|---|---|---|")
    ratios = [b / a for a, b in zip(decode[::2], decode[1::2], strict=True)]
    low, high = interval(ratios)
    print(
        f"| decode | {median(decode[::2]):.2f} tok/s | {median(decode[1::2]):.2f} tok/s "
        f"| {median(ratios):.3f} ({low:.3f}-{high:.3f}) |"
    )
    b = [speed / median(alone) for speed in beside]
    low, high = interval(b)
    print(
        f"| reads | {median(alone) / 1e9:.2f} GB/s | {median(beside) / 1e9:.2f} GB/s "
        f"| {median(b):.3f} ({low:.3f}-{high:.3f}) |"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
