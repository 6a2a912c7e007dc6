"""A regular expression as a GBNF grammar: what a grammar can hold of it, exactly, and an error for the rest. And which
texts it matches, without the searching that takes some patterns of Python's for ever."""

from __future__ import annotations

import importlib
import re
import string
import sys
from typing import Any

from .._errors import GrammarError

# Python's own parser of regular expressions, which has no name that is public
parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
codes: Any = importlib.import_module("re._constants" if sys.version_info >= (3, 11) else "sre_constants")

_CLASSES = {"CATEGORY_DIGIT": "0-9", "CATEGORY_WORD": "a-zA-Z0-9_", "CATEGORY_SPACE": r" \t\n\r\x0B\x0C"}
_CHARACTERS = {
    "CATEGORY_DIGIT": string.digits,
    "CATEGORY_WORD": f"{string.ascii_letters}{string.digits}_",
    "CATEGORY_SPACE": " \t\n\r\x0b\x0c",
}


def regex_grammar(pattern: str) -> str:
    r"""The grammar of all texts that `pattern` matches as a whole. \d, \w and \s are those of ASCII.

    Raises: GrammarError for a pattern that is none, or that looks around, refers back or ignores case.
    """
    return "root ::= " + (_sequence(_parsed(pattern), pattern) or '""')


def matches(pattern: str, text: str) -> bool:
    """Whether the grammar of a pattern has a text: by the places where each part of it may end."""
    return len(text) in _ends(_parsed(pattern), text, {0})


def _parsed(pattern: str) -> list[Any]:
    """What a pattern consists of. Raises: GrammarError for one that is none."""
    try:
        tree = parser.parse(pattern)
    except (re.error, OverflowError, RecursionError) as e:
        raise GrammarError(f"the regular expression {pattern!r} cannot be parsed: {e}") from e
    if tree.state.flags & ~re.UNICODE & ~re.ASCII:
        raise GrammarError(f"the regular expression {pattern!r} has flags, such as (?i); write them out")
    items = list(tree)
    if items and items[0] == (codes.AT, codes.AT_BEGINNING):  # the whole text is matched anyway
        items = items[1:]
    if items and items[-1][0] is codes.AT and str(items[-1][1]) in ("AT_END", "AT_END_STRING"):
        items = items[:-1]
    return items


def choice_grammar(choices: list[str]) -> str:
    """The grammar of one of these texts. Raises: GrammarError if there are none."""
    if not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise GrammarError("choices are a list of texts that are not empty")
    return "root ::= " + " | ".join(_literal(choice) for choice in choices)


def _sequence(items: Any, pattern: str) -> str:
    return " ".join(_item(code, value, pattern) for code, value in items)


def _item(code: Any, value: Any, pattern: str) -> str:
    if code is codes.LITERAL:
        return _literal(chr(value))
    if code is codes.NOT_LITERAL:
        return f"[^{_in_class(value)}]"
    if code is codes.ANY:
        return r"[^\n]"
    if code is codes.IN:
        return _set(value, pattern)
    if code is codes.BRANCH:
        return "(" + " | ".join(_sequence(branch, pattern) or '""' for branch in value[1]) + ")"
    if code is codes.SUBPATTERN and not value[1] and not value[2]:
        return f"({_sequence(value[3], pattern) or chr(34) * 2})"
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT):  # which texts match does not depend on greed
        least, most, inner = value
        return f"({_sequence(inner, pattern) or chr(34) * 2})" + _times(least, most)
    kind = str(code).lower().replace("_", " ")
    raise GrammarError(f"the regular expression {pattern!r} has what a grammar cannot hold: {kind}")


def _ends(items: Any, text: str, starts: set[int]) -> set[int]:
    """Where a sequence of parts may end that begins at one of these places."""
    for code, value in items:
        if code is codes.BRANCH:
            starts = set().union(*(_ends(branch, text, starts) for branch in value[1]))
        elif code is codes.SUBPATTERN:
            starts = _ends(value[3], text, starts)
        elif code in (codes.MAX_REPEAT, codes.MIN_REPEAT):
            starts = _ends_of_repeat(value, text, starts)
        else:
            starts = {i + 1 for i in starts if i < len(text) and _is_one(code, value, text[i])}
    return starts


def _ends_of_repeat(repeat: Any, text: str, starts: set[int]) -> set[int]:
    least, most, items = repeat
    times = 0
    while times < least and starts != (after := _ends(items, text, starts)):
        starts, times = after, times + 1
    found, times = set(starts), least
    while starts and times < most:
        starts, times = _ends(items, text, starts) - found, times + 1
        found |= starts
    return found


def _is_one(code: Any, value: Any, char: str) -> bool:
    """Whether this is a character that a part stands for."""
    if code is codes.ANY:
        return char != "\n"
    if code in (codes.LITERAL, codes.NOT_LITERAL):
        return (ord(char) == value) is (code is codes.LITERAL)
    if code is codes.RANGE:
        return bool(value[0] <= ord(char) <= value[1])
    if code is codes.CATEGORY:
        kind = str(value)
        return (char in _CHARACTERS[kind.replace("NOT_", "")]) is ("NOT_" not in kind)
    negated = value[0][0] is codes.NEGATE
    return any(_is_one(c, v, char) for c, v in value[negated:]) is not negated


def _times(least: int, most: Any) -> str:
    if most == codes.MAXREPEAT:
        return {0: "*", 1: "+"}.get(least, f"{{{least},}}")
    return f"{{{least},{most}}}"


def _set(items: Any, pattern: str) -> str:
    negated = items[0][0] is codes.NEGATE
    text = ""
    alone = len(items) - negated == 1
    for code, value in items[negated:]:
        positive = str(value).replace("NOT_", "")
        if code is codes.LITERAL:
            text += _in_class(value)
        elif code is codes.RANGE:
            text += f"{_in_class(value[0])}-{_in_class(value[1])}"
        elif code is codes.CATEGORY and str(value) in _CLASSES:
            text += _CLASSES[str(value)]
        elif code is codes.CATEGORY and positive in _CLASSES and alone:
            text, negated = _CLASSES[positive], not negated
        else:
            raise GrammarError(f"the regular expression {pattern!r} has a set that a grammar cannot hold")
    return f"[{'^' if negated else ''}{text}]"


def _literal(text: str) -> str:
    return '"' + "".join(f"\\{c}" if c in '"\\' else _plain(ord(c)) for c in text) + '"'


def _in_class(code: int) -> str:
    return "\\" + chr(code) if chr(code) in "[]\\" else _escaped(code) if chr(code) in "^-" else _plain(code)


def _plain(code: int) -> str:
    return chr(code) if 0x20 <= code < 0x7F else _escaped(code)


def _escaped(code: int) -> str:
    return f"\\x{code:02X}" if code < 0x100 else f"\\u{code:04X}" if code < 0x10000 else f"\\U{code:08X}"
