"""Keyword arguments by the names that people know, and what was meant by the others."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any


def by_own_names(given: Mapping[str, Any], synonyms: Mapping[str, str]) -> dict[str, Any]:
    """`given` with synonyms replaced. Raises: TypeError where two names of one thing are given."""
    found: dict[str, Any] = {}
    said: dict[str, str] = {}
    for name, value in given.items():
        own = synonyms.get(name, name)
        if own in found:
            raise TypeError(f"{said[own]} and {name} are the same; give one of them")
        found[own], said[own] = value, name
    return found


def unknown(name: str, known: Iterable[str], where: str) -> TypeError:
    """The error for a keyword argument that nobody knows."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]}?" if close else ""
    return TypeError(f"{where} has no parameter {name!r}{hint}")
