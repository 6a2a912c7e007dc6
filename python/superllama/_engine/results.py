"""What comes back: frozen objects, with OpenAI's names where those exist."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from .tools import ToolCall

# "stop": the model ended, or a stop text came; "length": max_tokens, or the context is full
FinishReason = Literal["stop", "length", "tool_calls"]


@dataclasses.dataclass(frozen=True)
class Usage:
    """Tokens of a request. `cached_tokens` are those of the prompt that did not have to be computed."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


@dataclasses.dataclass(frozen=True)
class Timings:
    """A request's time in its slot, which others may have shared; without the time that it waited for one."""

    prompt_ms: float
    prompt_tokens_per_sec: float
    generated_ms: float
    tokens_per_sec: float
    draft_tokens: int = 0  # proposed by speculation
    draft_accepted: int = 0


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token that was chosen, its log-probability, and the most likely ones in its place."""

    token: int
    text: str
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclasses.dataclass(frozen=True)
class Completion:
    """A text that goes on from a prompt. `stop_reason` is the stop text that ended it, None if none did."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | None
    usage: Usage
    timings: Timings
    logprobs: tuple[TokenLogprob, ...] | None = None
    parsed: Any = None  # with response_format
    alternatives: tuple[Completion, ...] = ()  # with n above 1


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of an answer that streams. The last one of each text has `finish_reason`, `usage` and `timings`.

    `progress` is the share of the prompt that is computed, in chunks that come before the first text.
    """

    text: str
    tokens: tuple[int, ...] = ()
    index: int = 0  # of the prompt, where there are several
    reasoning: str = ""  # of chat(), apart from the text
    logprobs: tuple[TokenLogprob, ...] | None = None
    progress: float | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    tool_calls: tuple[ToolCall, ...] = ()  # in the last one, whole


@dataclasses.dataclass(frozen=True)
class ChatCompletion:
    """An answer in a conversation. `message` is what goes into the conversation; `parsed` is the object of a
    `response_format`."""

    text: str
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: Timings
    message: Mapping[str, Any]
    logprobs: tuple[TokenLogprob, ...] | None = None
    parsed: Any = None


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A document by its relevance to a query: the reranker's own score, whatever its scale."""

    index: int  # in the list that was given
    score: float
    document: str
