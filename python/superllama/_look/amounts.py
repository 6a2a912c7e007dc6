"""Amounts as pages say them: memory in MiB, what is read in MB, shares, time."""

from __future__ import annotations

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
UNLIMITED = 2**64 - 1


def size(n_bytes: int) -> str:
    """Bytes in a table: "1.5 GB"."""
    if n_bytes >= UNLIMITED:
        return "unlimited"
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= scale:
            return f"{n_bytes / scale:.1f} {unit}"
    return f"{n_bytes} B"


def memory(n_bytes: float) -> str:
    """Bytes of memory: "300 MiB", "1.5 GiB"."""
    for unit, scale in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if n_bytes >= 0.9995 * scale:
            return f"{number(n_bytes / scale)} {unit}"
    return f"{n_bytes:.0f} B"


def volume(n_bytes: float) -> str:
    """Bytes that were read or written: "21.2 GB"."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if n_bytes >= 0.9995 * scale:
            return f"{number(n_bytes / scale)} {unit}"
    return f"{n_bytes:.0f} B"


def number(x: float) -> str:
    """Three digits, or all that are before the point: "2.42", "16.1", "1,040"."""
    if x == int(x) or x >= 99.95:
        return f"{x:,.0f}"
    return f"{x:.1f}" if x >= 9.995 else f"{x:.2f}"


def plain(x: float) -> str:
    """A round number, as it stands at a scale: "0.5", "1,500"."""
    return f"{x:,.10g}"


def share(x: float) -> str:
    """A part of one: "62 %"; a small one is not said to be none, nor a large one to be all."""
    if 0 < x < 0.005:
        return "less than 1 %"
    if 0.995 <= x < 1:
        return "more than 99 %"
    return f"{100 * x:.0f} %"


def duration(seconds: float) -> str:
    """Time: "413 ms", "25.7 s", "3 min 20 s", "2 h 5 min"."""
    if seconds < 0.9995:
        return f"{number(1000 * seconds)} ms"
    if seconds < 99.95:
        return f"{number(seconds)} s"
    if seconds < 3600:
        minutes, rest = divmod(round(seconds), 60)
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
