"""Sizes as people write them. MB = 10^6 bytes, MiB = 2^20, as in the flags and the metrics."""

from __future__ import annotations

import math
import re

UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
UNITS |= {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def parse_size(text: str) -> int:
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    size = float(match[1]) * UNITS.get(match[2].lower(), math.inf) if match else math.inf
    if not math.isfinite(size):
        raise ValueError(f"size {text!r}: give a number and one of B, KB, MB, GB, KiB, MiB, GiB, for example 1.5GB")
    return int(size)


def format_size(n: float) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if abs(n) >= size:
            return f"{n / size:.2f} {unit}" if unit == "GB" else f"{n / size:.1f} {unit}"
    return f"{n:.0f} B"
