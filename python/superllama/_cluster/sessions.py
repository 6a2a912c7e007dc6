"""Which replica a conversation belongs to: always the same one, so that what it has computed of it is there.

A replica is chosen by rendezvous hashing: every session has an order of all replicas, and takes the first that there
is. One that goes away moves its own sessions only, and one that comes takes an equal part of those of all others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

HEADER = "x-session-id"  # as Ray Serve calls it
FIELDS = ("session_id", "prompt_cache_key", "conversation", "user", "safety_identifier")  # in the words of several APIs
BEGINNING = 512  # characters of a plain prompt that tell texts apart which go on

T = TypeVar("T")

GROUPS: list[dict[str, Any]] = []  # in the process of a front: what each group said last of itself


def session_of(headers: Mapping[str, str], body: bytes) -> str:
    """Whose conversation a request goes on with: what a header or a field says, else how its prompt begins; "" where it
    has none. Header names are in lower case."""
    if named := headers.get(HEADER):
        return "id:" + named
    try:
        asked = json.loads(body) if body else None
    except ValueError:  # the engine says what is wrong with it
        return ""
    if not isinstance(asked, dict):
        return ""
    for name in FIELDS:
        value = asked.get(name)
        if isinstance(value, Mapping):
            value = value.get("id")
        if isinstance(value, str | int) and value != "":
            return f"{name}:{value}"
    beginning = _beginning(asked)
    return f"begins:{hashlib.blake2b(beginning.encode(), digest_size=16).hexdigest()}" if beginning else ""


def _beginning(asked: Mapping[str, Any]) -> str:
    """Of the prompt, up to the end of what the user said first: a conversation that goes on has the same one."""
    messages = asked.get("messages", asked.get("input"))
    if isinstance(messages, list) and messages and all(isinstance(message, dict) for message in messages):
        first = next((i for i, message in enumerate(messages) if message.get("role") == "user"), len(messages) - 1)
        said = [[message.get("role"), message.get("content")] for message in messages[: first + 1]]
        return json.dumps([asked.get("system"), said], ensure_ascii=True)
    prompt = asked.get("prompt", messages)
    if prompt is None or prompt == "" or prompt == []:
        return ""
    return json.dumps(prompt, ensure_ascii=True)[:BEGINNING]


def in_order(session: str, replicas: Iterable[tuple[str, T]]) -> list[T]:
    """The replicas, by name, in the order of this session."""

    def weight(name: str) -> bytes:
        return hashlib.blake2b(f"{session}\0{name}".encode(), digest_size=8).digest()

    return [replica for _, replica in sorted(replicas, key=lambda one: weight(one[0]), reverse=True)]
