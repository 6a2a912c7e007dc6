"""Rows, bars and sparklines of characters, their colours, and what stands for them where a terminal has ASCII only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.text import Text

LABEL, VALUE = 10, 13  # columns

READS, COMPUTES, MOVES = "yellow", "green", "blue"
SPARKS = "▁▂▃▄▅▆▇█"
FULL, HATCHED = "█", "▒"  # to be told apart without colours
_ASCII = str.maketrans(SPARKS + "▣░▒▓·", "_.,-=+*#D.:%-")


def row(label: str, *parts: str | tuple[str, str] | Text) -> Text:
    """A line with a label before it, which may be empty."""
    return Text.assemble(label.ljust(LABEL), *parts)


def bar(parts: Iterable[tuple[float, str, str]], whole: float, width: int) -> Text:
    """Amounts beside each other, each with its character and colour; dots for what they leave of the whole."""
    text, total, drawn = Text(), 0.0, 0
    for amount, mark, style in parts:
        total += amount
        cells = round(width * min(1.0, total / whole)) - drawn if whole > 0 else 0
        text.append(mark * cells, style)
        drawn += cells
    return text.append("·" * (width - drawn), "dim")


def sparkline(values: Sequence[float | None], top: float) -> str:
    """A character for each value, as high as it is on the scale from 0 to `top`; none where it is not known."""

    def mark(value: float | None) -> str:
        if value is None:
            return " "
        share = min(1.0, value / top) if top > 0 else 0.0
        return SPARKS[min(len(SPARKS) - 1, int(share * len(SPARKS)))]

    return "".join(map(mark, values))


def for_terminal(line: Text, ascii_only: bool) -> Text:
    """The line with nothing in it that moves a cursor, since a server's texts are shown too; in ASCII, if need be."""
    plain = line.plain.translate(_ASCII) if ascii_only else line.plain
    line.plain = "".join(c if c.isprintable() and (c.isascii() or not ascii_only) else "?" for c in plain)
    return line
