"""A map of experts: a row for each layer, a column for each. The colour says where an expert is, its strength how
often routers chose it.

A model has thousands of experts: those of one colour and strength are one path, in which neighbours of a row are one
rectangle.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .amounts import share
from .drawing import TIER_COLOURS, TIER_WORDS

TIERS = ("host", "disk", "device")  # as superllama_tier counts them
STRENGTHS = (0.07, 0.2, 0.32, 0.44, 0.56, 0.68, 0.84, 1.0)  # of the colour; the first: never chosen
ROW, LEAST, MOST = 7, 40, 420  # pixels: of a row, and of the map


@dataclass(frozen=True)
class Shade:
    """Experts of one tier that were chosen about as often."""

    colour: str
    strength: float
    path: str


@dataclass(frozen=True)
class HeatMap:
    """A map of `columns` by `rows` cells of one unit each."""

    columns: int
    rows: int
    height: int  # pixels
    shades: list[Shade]
    scale: list[tuple[float, str]]  # percent from the top, and the layer there
    tiers: list[tuple[str, int, str]]  # words, number of experts, colour
    said: str  # how uneven the choices are


def heat_map(experts: Mapping[str, Any] | None) -> HeatMap | None:
    """Of numbers by layer and expert, as GET /superllama?experts=1 answers them; None where there are no experts."""
    if not experts or not experts["layers"]:
        return None
    uses, tiers = experts["uses"], experts["tier"]
    most = max(max(row) for row in uses)
    runs: dict[tuple[int, int], list[str]] = {}
    for y, (row, where) in enumerate(zip(uses, tiers, strict=True)):
        x = 0
        for shade, cells in itertools.groupby(zip(where, (_level(n, most) for n in row), strict=True)):
            width = len(list(cells))
            runs.setdefault(shade, []).append(f"M{x} {y}h{width}v1h-{width}z")
            x += width
    shades = [
        Shade(TIER_COLOURS[TIERS[tier]], STRENGTHS[level], "".join(parts))
        for (tier, level), parts in sorted(runs.items())
    ]
    n_rows = len(uses)
    counts = [sum(row.count(tier) for row in tiers) for tier in range(len(TIERS))]
    return HeatMap(
        columns=max(len(row) for row in uses),
        rows=n_rows,
        height=min(MOST, max(LEAST, ROW * n_rows)),
        shades=shades,
        scale=[(100 * (y + 0.5) / n_rows, str(experts["layers"][y])) for y in _marks(n_rows)],
        tiers=[(TIER_WORDS[name], n, TIER_COLOURS[name]) for name, n in zip(TIERS, counts, strict=True) if n],
        said=_said(uses),
    )


def _level(n: int, most: int) -> int:
    """Which strength; by the root, so that seldom is not never."""
    if not n:
        return 0
    steps = len(STRENGTHS) - 1
    return max(1, min(steps, round(steps * math.sqrt(n / most))))


def _marks(n: int) -> list[int]:
    """A few rows, the first and the last among them."""
    step = next(s for s in (1, 2, 4, 5, 10, 20, 25, 50, 100, n) if n / s <= 6)
    found = [y for y in range(0, n, step) if n - 1 - y >= step / 2]
    return [*found, n - 1]


def _said(uses: Sequence[Sequence[int]]) -> str:
    """How many experts half of all choices went to."""
    flat = sorted((n for row in uses for n in row), reverse=True)
    total = sum(flat)
    if not total:
        return "none was chosen so far"
    n_half = next(i for i, sum_ in enumerate(itertools.accumulate(flat), 1) if 2 * sum_ >= total)
    idle = flat.count(0)
    never = f"; {idle:,} {'was' if idle == 1 else 'were'} never chosen" if idle else ""
    return f"half of {total:,} choices went to {share(n_half / len(flat))} of {len(flat):,} experts{never}"
