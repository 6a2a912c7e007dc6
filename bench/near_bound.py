"""How near the bound a dense model decodes, on a machine whose speed wanders from minute to minute.

    python bench/near_bound.py MODEL.gguf [--engine superllama-repack] [--budgets 25 50 75 90] [--turns 8] [--tokens 4]

Two programs stay loaded: one with everything in memory, one with the budget. Before and after each turn of the second,
the first takes one and the disk is read, as superllama reads it and where the weights are streamed from; a turn is
held against min(compute, B / (S - M)) of just these two moments. Prints medians, and 95 % intervals of the shares:
with the model's size for S, and strictly, with what a token needs of it. Memory for the model and the largest budget
is needed; bench/bigger_than_memory.py measures fresh processes, a cold cache and the peak of memory.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import bound, disk_speed, engine
from bench.off_is_stock import Program, interval
from bench.trace.tensors import read_map

READ_BYTES = 2 << 30  # for one measurement of B


@dataclass(frozen=True)
class Moment:
    """What the machine gives."""

    compute: float  # tokens/s with everything in memory
    bytes_per_s: float  # B


@dataclass(frozen=True)
class Turn:
    decode: float  # tokens/s
    limits: bound.Limits

    def reached(self, budget: int) -> float:
        return self.decode / self.limits.dense(budget)


def moment(whole: Program, file: Path) -> Moment:
    whole.turn()
    return Moment(whole.seen[-1]["decode"], disk_speed.measure(file, n_bytes=READ_BYTES).bytes_per_s)


def take_turns(limited: Program, whole: Program, file: Path, size: int, turns: int) -> Iterator[Turn]:
    before = moment(whole, file)
    for _ in range(turns):
        limited.turn()
        after = moment(whole, file)
        compute, speed = (before.compute + after.compute) / 2, (before.bytes_per_s + after.bytes_per_s) / 2
        yield Turn(limited.seen[-1]["decode"], bound.Limits(size, 0, speed, compute))
        before = after


def row(percent: int, budget: int, turns: list[Turn], needed_bytes: int, same: bool) -> str:
    cells = [f"{percent} %", str(len(turns)), f"{median(t.limits.compute for t in turns):.2f} tok/s",
             f"{median(t.limits.bytes_per_s for t in turns) / 1e9:.2f} GB/s",
             f"{median(t.decode for t in turns):.2f} tok/s"]  # fmt: skip
    strict = [replace(t, limits=replace(t.limits, needed_bytes=needed_bytes)) for t in turns]
    for of_bound in (turns, strict):
        reached = [t.reached(budget) for t in of_bound]
        low, high = interval(reached)
        cells.append(f"{median(t.limits.dense(budget) for t in of_bound):.2f}, "
                     f"{median(reached):.2f} ({low:.2f}-{high:.2f})")  # fmt: skip
    return "| " + " | ".join([*cells, "identical" if same else "DIFFERENT"]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--engine", default="superllama-repack", help="of engines.toml, one that takes a budget")
    parser.add_argument("--budgets", type=int, nargs="+", default=[25, 50, 75, 90], help="percent of the model's size")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    chosen = engine.get(args.engine)
    if "{budget}" not in chosen.flags:
        parser.error(f"{args.engine} takes no budget; superllama and superllama-repack do")
    where = read_map(args.model)
    if bound.expert_bytes(where):
        parser.error(f"{args.model} has experts, whose bound is what they miss: see bench/bigger_than_memory.py")
    args.repack = int(chosen.repacks)
    os.environ.update(chosen.environment(args.model))

    def load(budget: int) -> Program:
        program = Program(chosen.program, args, " ".join(chosen.flags).format(budget=budget))
        program.turn()  # which touches its memory for the first time
        return program

    whole = load(2 * where.file_bytes)
    same = True
    print("| budget | turns | in memory | B | decode | bound, reached (95 %) | strictly | logits |", flush=True)
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for percent in args.budgets:
        budget = where.file_bytes * percent // 100
        limited = load(budget)
        file = chosen.file(args.model)
        turns = list(take_turns(limited, whole, file, where.file_bytes, args.turns))
        limited.close()
        same = same and len({*limited.hashes, *whole.hashes}) == 1
        print(row(percent, budget, turns, bound.needed_bytes(where), same), flush=True)
    whole.close()
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
