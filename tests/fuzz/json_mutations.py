"""What can be wrong with a JSON text: one change at a time to a value, and texts that no value has."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

DEEP = 10_000
NUMBERS = (
    0, -0.0, 1, -1, 2, 3, 0.5, -0.5, 7, 63, 64, 65, 255, 256, 302, 303, 304, 511, 512, 513, 4096, 65536, 2**24,
    2**24 + 1, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32 - 1, 2**32, 2**53 + 1, 2**63 - 1, 2**63, -(2**63),
    2**64 - 1, 2**64, 1e-320, 1e-45, 1e-6, 1e9, 3.4e38, 3.5e38, -3.5e38, 1.7e308,
)  # fmt: skip
TEXTS = (
    "", " ", "a", "\0", "\n", "the cat", "é", "😀", "é" * 300, "a" * 10_000, "a b " * 3000, "<s></s>", "%s%n", "../x",
    "<0xFF>", "null", "0", "-1", "1e999", "\ufeff", "\ud800", '"', "\\", "{{ x }}", "[" * 2000, "{" * 2000, "_" * 9000,
)  # fmt: skip


class Raw:
    """Bytes that stand in the text as they are."""

    def __init__(self, data: bytes) -> None:
        self.data = data


class Twice:
    """Two values of one key."""

    def __init__(self, first: object, second: object) -> None:
        self.values = (first, second)


RAW = (
    b"NaN", b"Infinity", b"-Infinity", b"1e999", b"-1e999", b"1" * 400, b"0." + b"0" * 400 + b"1", b"01", b"+1", b".5",
    b"1.", b"0x10", b"'a'", b'"\\ud800"', b'"\\udc00\\ud800"', b'"\xff"', b'"\xc3"', b'"\xed\xa0\x80"', b'"\\u0000"',
    b'"\\x41"', b'"\x00"', b'"\n"', b'"', b"", b",", b"]", b"}", b"nul", b"True", b"/*a*/1", b"\xef\xbb\xbf1",
    b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP + b"1" + b"}" * DEEP, b"[" * DEEP, b"[" * 400 + b"]" * 400,
)  # fmt: skip


def dumped(value: object) -> bytes:
    if isinstance(value, Raw):
        return value.data
    if isinstance(value, Twice):
        return dumped(value.values[1])
    if isinstance(value, list | tuple):
        return b"[" + b",".join(map(dumped, value)) + b"]"
    if isinstance(value, dict):
        pairs = [(k, v) for k, given in value.items() for v in (given.values if isinstance(given, Twice) else [given])]
        return b"{" + b",".join(dumped(k) + b":" + dumped(v) for k, v in pairs) + b"}"
    return json.dumps(value).encode()


def odd(rng: random.Random) -> Any:
    """A value that is seldom what was asked for."""
    kind = rng.randrange(10)
    if kind < 4:
        return rng.choice(NUMBERS)
    if kind < 6:
        return rng.choice(TEXTS)
    if kind < 7:
        return Raw(rng.choice(RAW))
    if kind < 8:
        return rng.choice((None, True, False))
    few: list[Any] = [
        rng.choice((rng.choice(NUMBERS), rng.choice(TEXTS), None, [], {})) for _ in range(rng.choice((0, 1, 2, 5)))
    ]
    return few if kind < 9 else {str(i): v for i, v in enumerate(few)}


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of the value with each of its keys."""
    if isinstance(value, dict | list):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from places(value[key])


def _said(value: object) -> str:
    text = dumped(value).decode("utf-8", "replace")
    return text if len(text) < 60 else f"{text[:40]}... ({len(text)})"


def mutated(rng: random.Random, value: Any, fields: Mapping[str, Sequence[Any]], n: int) -> tuple[Any, str]:
    """A copy with so many changes, and what they are. `fields` are keys, with values that go with them."""
    root = [copy.deepcopy(value)]
    notes = []
    for _ in range(n):
        container, key = rng.choice(list(places(root)))
        notes.append(_change(rng, container, key, fields))
    return root[0], "; ".join(notes)


def _change(rng: random.Random, container: Any, key: Any, fields: Mapping[str, Sequence[Any]]) -> str:
    old = container[key]
    kind = rng.randrange(12)
    if isinstance(old, dict) and (kind < 7 or not old):  # one more key, or another value of one that is known
        name = rng.choice(sorted(fields)) if rng.random() < 0.95 else rng.choice(TEXTS)
        old[name] = copy.deepcopy(rng.choice(fields[name])) if rng.random() < 0.6 and name in fields else odd(rng)
        return f"{name!r:.30} = {_said(old[name])}"
    if isinstance(container, dict) and kind == 7:
        del container[key]
        return f"without {key!r:.30}"
    if isinstance(container, dict) and kind == 8:
        container[key] = Twice(old, odd(rng))
        return f"{key!r:.30} twice"
    if kind == 9:
        container[key] = rng.choice(([old], [old] * 3, {"a": old}, {key: old} if isinstance(key, str) else [[old]]))
        return f"{key!r:.30} wrapped"
    if isinstance(old, list) and old and kind == 10:
        old *= rng.choice((2, 10, 100))
        return f"{key!r:.30} repeated"
    if isinstance(old, str) and old and kind == 11:
        at = rng.randrange(len(old))
        container[key] = old[:at] + rng.choice(TEXTS) + old[at + rng.randrange(3) :]
        return f"{key!r:.30} with other letters"
    container[key] = odd(rng)
    return f"{key!r:.30} = {_said(container[key])}"


def damaged(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """A text that was cut off, or has some other bytes."""
    at = rng.randrange(len(data) + 1)
    if rng.random() < 0.3:
        return data[:at], f"cut off at {at}"
    other = rng.choice(
        (b"", b"\0", b"\xff", b'"', b"\\", b"{", b"]", b",", b":", b"e", b"-", b"\xed\xa0\x80", bytes(300))
    )
    return data[:at] + other + data[at + rng.randrange(3) :], f"{other[:8]!r} at {at}"
