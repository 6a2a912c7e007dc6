#!/usr/bin/env python3
"""Replay a trace against LRU, MRU, pinned blocks and Belady's optimum: what would each have read at a budget?

bench/simulate.py RESULTS/runs/RUN/reader.parquet --budget 25% 50% 75%
bench/simulate.py routing.parquet --unit expert --budget 500MB     (of bench/moe_routing.py --trace)
bench/simulate.py --cyclic dense.gguf --tokens 20 --budget 50%     (every weight in file order, once per token)

The trace should hold what was asked for. A block trace of a run with a page cache holds what that cache missed: a
replay then says what a second cache behind it would do. The first use of every block is a miss for all policies.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.policies import POLICIES
from bench.sizes import format_size, parse_size
from bench.trace import table, tensors


@dataclass(frozen=True)
class Point:
    budget_bytes: int
    capacity: int  # blocks
    policy: str
    hit_rate: float
    read_bytes: int
    over_optimum: float  # bytes read / bytes that the optimum reads

    @staticmethod
    def head() -> str:
        return "| budget | policy | hit rate | bytes read | times the optimum |\n|---|---|---|---|---|"

    def row(self) -> str:
        cells = (format_size(self.budget_bytes), self.policy, f"{self.hit_rate:.1%}", format_size(self.read_bytes),
                 f"{self.over_optimum:.2f}")  # fmt: skip
        return f"| {' | '.join(cells)} |"


def to_blocks(trace: pa.Table, block: int) -> list[int]:
    """Requests to block numbers; a block that several requests in a row touch is one use of it."""
    offset, size = table.column(trace, "offset"), table.column(trace, "bytes")
    first, last = offset // block, (offset + np.maximum(size, 1) - 1) // block
    count = (last - first + 1).astype(np.int64)
    refs = np.repeat(first, count) + np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return refs[np.insert(np.diff(refs) != 0, 0, True)].tolist() if len(refs) else []


def to_experts(trace: pa.Table, where: tensors.TensorMap | None) -> tuple[list[int], int]:
    """Requests to (layer, expert), and the bytes of one expert. Gate, up and down in a row are one use."""
    if "expert" in trace.column_names:
        layer, expert = table.column(trace, "layer"), table.column(trace, "expert")
    elif where is None:
        raise ValueError("--unit expert needs a trace with layer and expert, or --model to look them up")
    else:
        _, index, _ = where.split(table.column(trace, "offset"), table.column(trace, "bytes"))
        layer, expert = where.layers[index], where.experts[index]
    keep = expert >= 0
    refs = layer[keep].astype(np.int64) * (1 << 20) + expert[keep]
    if not len(refs):
        raise ValueError(
            "the trace touches no expert; is its model a MoE model? without --unit expert it can be replayed"
        )
    sizes: dict[int, dict[int, int]] = {}
    if where is None:
        offsets, n = table.column(trace, "offset")[keep], table.column(trace, "bytes")[keep]
        for ref, at, size in zip(refs.tolist(), offsets.tolist(), n.tolist(), strict=True):
            sizes.setdefault(ref, {})[at] = size
        one = int(np.median([sum(s.values()) for s in sizes.values()]))
    else:
        one = sum(n for _, n in where.expert_ranges(int(layer[keep][0]), int(expert[keep][0])))
    return refs[np.insert(np.diff(refs) != 0, 0, True)].tolist(), one


def cyclic(model: Path, tokens: int) -> pa.Table:
    """What a dense model asks for: the matrices of its layers and its output, in file order, once per token."""
    where = tensors.read_map(model)
    used = [i for i, name in enumerate(where.names) if name not in ("header", "padding", "token_embd.weight")]
    offset, size = np.tile(where.starts[:-1][used], tokens), np.tile(where.sizes[used], tokens)
    return table.make(np.repeat(np.arange(tokens), len(used)), offset, size, model.name)


def replay(refs: list[int], block: int, budgets: list[int]) -> list[Point]:
    out = []
    for budget in budgets:
        capacity = budget // block
        if capacity < 1:
            raise ValueError(f"budget {format_size(budget)} is less than one block of {format_size(block)}; "
                             "give a larger budget or a smaller --block")  # fmt: skip
        misses = {name: len(refs) - sum(policy(refs, capacity)) for name, policy in POLICIES.items()}
        for name, missed in misses.items():
            rate = 1 - missed / len(refs)
            out.append(Point(budget, capacity, name, rate, missed * block, missed / max(1, misses["optimum"])))
    return out


def parse_budget(text: str, whole: int) -> int:
    return int(whole * float(text[:-1]) / 100) if text.endswith("%") else parse_size(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, nargs="?")
    parser.add_argument("--cyclic", type=Path, metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument(
        "--budget", nargs="+", default=["25%", "50%", "75%", "90%"], help="sizes, or shares of what is used"
    )
    parser.add_argument("--block", type=parse_size, default=1 << 20)
    parser.add_argument("--unit", choices=["block", "expert"], default="block")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--json", action="store_true")
    a = parser.parse_args()
    try:
        if (a.trace is None) == (a.cyclic is None):
            raise ValueError("give a trace, or --cyclic MODEL")
        trace = cyclic(a.cyclic, a.tokens) if a.cyclic else table.load(a.trace)
        if a.unit == "expert":
            refs, block = to_experts(trace, tensors.read_map(a.model) if a.model else None)
        else:
            refs, block = to_blocks(trace, a.block), a.block
        if not refs:
            raise ValueError(f"{a.trace} holds no request")
        whole = len(set(refs)) * block
        points = replay(refs, block, [parse_budget(b, whole) for b in a.budget])
    except (ValueError, OSError) as error:
        print(f"simulate: {error}", file=sys.stderr)
        return 2
    if a.json:
        print(json.dumps([asdict(p) for p in points]))
        return 0
    print(f"{len(refs)} uses of {len(set(refs))} blocks of {format_size(block)} ({format_size(whole)})\n")
    print("\n".join([Point.head(), *(p.row() for p in points)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
