"""Geometry of pictures in pages: scales with round numbers, steps over time, bars of parts; and their colours.

Everything is in percent of a picture, 0 0 at its top left. A page stretches it to the room that there is and writes its
words beside it, so that they stay readable on a narrow one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# each stands out from white and from a dark ground alike, by 3 to 1 at least
BLUE, NAVY, CYAN, TEAL, GREEN = "#3d7cc9", "#4a68a8", "#2b95b0", "#219c86", "#5a9a3c"
GOLD, ORANGE, RED, PINK, PURPLE = "#b0872a", "#cf6f35", "#cc5a5a", "#c0589c", "#8767cf"
SLATE, BROWN, OLIVE, MAUVE, GREY = "#76849a", "#9a7a60", "#7d8a3a", "#a86f8f", "#8b8f96"

# what memory is for, in the order in which it is drawn
TAG_COLOURS = {
    "pinned": BLUE,
    "experts": TEAL,
    "ring": CYAN,
    "resident": NAVY,
    "rows": SLATE,
    "kv": PINK,
    "compute": ORANGE,
    "cpu_work": GOLD,
    "outputs": RED,
    "prompt_cache": PURPLE,
    "vocabulary": BROWN,
    "staging": GREEN,
    "uploads": OLIVE,
    "adapters": MAUVE,
    "projector": "#4f8f8f",
}
TIER_COLOURS = {"device": PURPLE, "host": BLUE, "disk": GREY}
TIER_WORDS = {"device": "on devices", "host": "in memory", "disk": "read when needed"}
SMALL = 0.015  # of a whole; parts below it are drawn as one, "other"


@dataclass(frozen=True)
class Part:
    """One part of a whole."""

    name: str
    colour: str
    text: str  # its value, for people
    left: float = 0.0
    width: float = 0.0


def bar(parts: Iterable[tuple[str, float, str, str]], whole: float = 0.0) -> list[Part]:
    """Parts (name, value, colour, text) side by side, on a scale that ends at `whole`, or where they do."""
    found = [part for part in parts if part[1] > 0]
    scale = max(whole, sum(part[1] for part in found)) or 1.0
    drawn, left = [], 0.0
    for name, value, colour, text in found:
        width = 100 * value / scale
        drawn.append(Part(name, colour, text, left, width))
        left += width
    return drawn


def tag_colour(tag: str) -> str:
    """Of what memory is for; another version may have further ones."""
    return TAG_COLOURS.get(tag, GREY)


def in_order(tags: Iterable[str]) -> list[str]:
    """What memory is for, in the order of drawing."""
    order = list(TAG_COLOURS)
    return sorted(tags, key=lambda tag: (order.index(tag) if tag in order else len(order), tag))


def large_tags(tags: Mapping[str, int]) -> list[tuple[str, int, str]]:
    """Name, bytes and colour of what memory is for; what is small as one."""
    least = SMALL * sum(tags.values())
    large = [(tag, tags[tag], tag_colour(tag)) for tag in in_order(tags) if tags[tag] > least]
    rest = sum(tags.values()) - sum(n for _, n, _ in large)
    return [*large, ("other", rest, GREY)] if rest else large


# ---------------------------------------------------------------- scales


def ticks(most: float, n: int = 4, base: int = 10, least: float = 0.0) -> list[float]:
    """Round numbers from 0 to the first that is not below `most`, about n steps, none smaller than `least`. With base 2
    they are round in bytes."""
    if most <= 0:
        return [0.0, 1.0]
    rough = max(most / n, least)
    if base == 2:
        unit = 1024.0 ** math.floor(math.log(rough, 1024) + 1e-9)
        step = next(unit * s for s in (1, 2, 4, 5, 10, 20, 25, 50, 100, 200, 250, 500, 1024) if unit * s >= rough)
    else:
        unit = 10.0 ** math.floor(math.log10(rough) + 1e-9)
        step = next(unit * s for s in (1, 2, 2.5, 5, 10) if unit * s >= rough * 0.999)
    return [i * step for i in range(math.ceil(most / step - 1e-9) + 1)]


def time_ticks(seconds: float, n: int = 6) -> list[tuple[float, str]]:
    """Moments in [0, seconds], as (percent, text), at steps that people count time in."""
    steps = (0.001, 0.01, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200)
    days = [86400 * 2**i for i in range(16)]
    step = next((s for s in (*steps, *days) if seconds / s <= n), days[-1])
    units = (("d", 86400.0), ("h", 3600.0), ("min", 60.0), ("s", 0.1), ("ms", 0.001))
    unit, scale = next((name, least) for name, least in units if step >= least)
    scale = 1.0 if unit == "s" else scale
    moments = [i * step for i in range(int(seconds / step + 1e-9) + 1)]
    return [(100 * m / seconds if m else 0.0, f"{m / scale:g} {unit}" if m else "0") for m in moments]


# ---------------------------------------------------------------- steps

Step = tuple[float, float, float]  # from, to, value; in any units


def path(steps: Sequence[Step], width: float, height: float, area: bool) -> str:
    """An SVG path of values that each hold for some time; where one does not begin at the end of the one before, there
    is a gap. `width` and `height` are the values at 100 percent. An area goes down to zero."""
    found: list[str] = []
    end = None
    for x0, x1, y in steps:
        left, right, top = (f"{100 * v:.2f}".rstrip("0").rstrip(".") for v in (x0 / width, x1 / width, 1 - y / height))
        if end is None or left != end:
            found.append(f"{'V100Z' if area and end is not None else ''}M{left} {'100V' if area else ''}{top}")
        else:
            found.append(f"V{top}")
        found.append(f"H{right}")
        end = right
    return "".join(found) + ("V100Z" if area and found else "")
