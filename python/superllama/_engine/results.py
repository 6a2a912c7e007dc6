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

    prompt_tokens: int  # of the whole prompt
    cached_tokens: int  # of those, that were computed before
    generated_tokens: int  # of all the text, the token that ended it included


@dataclasses.dataclass(frozen=True)
class Timings:
    """A request's time in its slot, which others may have shared; without the time that it waited for one."""

    prompt_ms: float  # computing what was new of the prompt
    prompt_tokens_per_sec: float  # of what was new; 0 = nothing
    generated_ms: float  # from the first token on
    tokens_per_sec: float  # generated
    draft_tokens: int = 0  # proposed by speculation
    draft_accepted: int = 0  # of those, that were right

    @property
    def draft_acceptance(self) -> float | None:
        """draft_accepted / draft_tokens, 0 to 1; None where nothing was proposed, as without speculation."""
        return self.draft_accepted / self.draft_tokens if self.draft_tokens else None


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token that was chosen, its log-probability, and the most likely ones in its place."""

    token: int  # its number; -1 = not told
    text: str  # what it adds
    logprob: float  # natural logarithm of its probability, before sampling
    top: tuple[TokenLogprob, ...] = ()  # the most likely first


@dataclasses.dataclass(frozen=True)
class Completion:
    """A text that goes on from a prompt. `stop_reason` is the stop text that ended it, None if none did."""

    text: str  # without the prompt and the stop text
    tokens: tuple[int, ...]  # of the text
    finish_reason: FinishReason  # why it ended
    stop_reason: str | None  # the stop text that ended it
    usage: Usage  # tokens, counted
    timings: Timings  # where its time went
    logprobs: tuple[TokenLogprob, ...] | None = None  # one a token, with logprobs=
    parsed: Any = None  # with response_format, choice or regex: the object, or the text
    alternatives: tuple[Completion, ...] = ()  # with n above 1: the others


@dataclasses.dataclass(frozen=True)
class Chunk:
    """A piece of an answer that streams. The last one of each text has `finish_reason`, `usage` and `timings`.

    `progress` is the share of the prompt that is computed, in chunks that come before the first text.
    """

    text: str  # what is new; may be empty
    tokens: tuple[int, ...] = ()  # of the text, of generate()
    index: int = 0  # of the prompt, where there are several
    reasoning: str = ""  # of chat(), apart from the text
    logprobs: tuple[TokenLogprob, ...] | None = None  # one a token, with logprobs=
    progress: float | None = None  # 0 to 1, before the first text
    finish_reason: FinishReason | None = None  # of the last one
    usage: Usage | None = None  # of the last one
    timings: Timings | None = None  # of the last one
    tool_calls: tuple[ToolCall, ...] = ()  # in the last one, whole


@dataclasses.dataclass(frozen=True)
class ChatCompletion:
    """An answer in a conversation. `message` is what goes into the conversation; `parsed` is the object of a
    `response_format`."""

    text: str  # what it says
    reasoning: str | None  # what it thought, apart from the text; None = nothing
    tool_calls: tuple[ToolCall, ...]  # what it wants to be called
    finish_reason: FinishReason  # why it ended
    usage: Usage  # tokens, counted
    timings: Timings  # where its time went
    message: Mapping[str, Any]  # to be put behind the others, for the next turn
    logprobs: tuple[TokenLogprob, ...] | None = None  # one a token, with logprobs=
    parsed: Any = None  # with response_format, choice or regex: the object, or the text


@dataclasses.dataclass(frozen=True)
class Ranked:
    """A document by its relevance to a query: the reranker's own score, whatever its scale."""

    index: int  # in the list that was given
    score: float  # the higher, the more relevant
    document: str  # as it was given
