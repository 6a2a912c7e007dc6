"""Keyword arguments by the names that people know, and what was meant by the others."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])
OWN = 0.15  # how much farther from what was given an own name may be than another one, and be proposed


def rest_by_name(method: F) -> F:
    """The method, which says what to write to those who put the sampling behind the prompt, as elsewhere."""
    kinds = inspect.signature(method).parameters.values()
    _, *names = [kind.name for kind in kinds if kind.kind is kind.POSITIONAL_OR_KEYWORD]

    @functools.wraps(method)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        if len(args) > len(names):
            given = type(args[len(names)]).__name__
            raise TypeError(
                f"{method.__name__}() takes {', '.join(names)}, and all else by its name, not in an object (here: "
                f"{given}): {method.__name__}({', '.join(names)}, temperature=0, max_tokens=64)"
            )
        return method(self, *args, **kwargs)

    return cast(F, checked)


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


def unknown(name: str, own: Iterable[str], others: Iterable[str], where: str) -> TypeError:
    """The error for a keyword argument that nobody knows. Proposed is an own name rather than one of the others."""
    matcher = difflib.SequenceMatcher(b=name)

    def closeness(other: str) -> float:
        matcher.set_seq1(other)
        return matcher.ratio()

    found = {other: closeness(other) for other in others} | {one: closeness(one) + OWN for one in own}
    best = max(found, key=lambda other: found[other])
    hint = f"; did you mean {best}?" if closeness(best) >= 0.6 else ""
    return TypeError(f"{where} has no parameter {name!r}{hint}")
