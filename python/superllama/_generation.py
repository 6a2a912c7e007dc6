"""What generate() yields, and the way from token bytes to text: whole characters, up to a stop string."""

from __future__ import annotations

import codecs
import dataclasses
from collections.abc import Sequence
from typing import Literal

FinishReason = Literal["eos", "stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class Summary:
    """A generation in numbers. Rates count the library's time only, not what the caller does between pieces.

    `tokens_per_sec` is over the tokens after the first one, which comes out of the prompt's computation.
    """

    prompt_tokens: int  # that were computed
    generated_tokens: int  # the last one included
    prompt_tokens_per_sec: float  # of the prompt
    tokens_per_sec: float  # after the first
    finish_reason: FinishReason  # why it ended; see Piece
    seed: int  # with which it would be the same again


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of generated text: what one token added.

    `text` may be empty while a character or a possible stop string is incomplete, and hold more than one
    token's text afterwards. `token` is None if the generation ended without one. The last piece, and only
    that, has `finish_reason` and `summary`: "eos" the model ended, "stop" a stop string came (it is not part
    of the text), "length" max_tokens or the context is used up, "cancelled" by Context.cancel().
    """

    text: str  # may be empty
    token: int | None  # None where it ended without one
    finish_reason: FinishReason | None = None  # of the last piece
    summary: Summary | None = None  # of the last piece


class TextStream:
    """Bytes in, text out: incomplete characters and possible beginnings of stop strings are held back."""

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stop = stop
        self.stopped = False  # a stop string came
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, data: bytes, *, final: bool = False) -> str:
        """The text that is certain now; `final` gives out all."""
        if self.stopped:
            return ""
        text = self._held + self._decoder.decode(data, final)
        found = [at for at in (text.find(stop) for stop in self.stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        n_held = 0 if final else self._n_possible(text)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]

    def _n_possible(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max((len(stop) - 1 for stop in self.stop), default=0))
        return next((n for n in range(longest, 0, -1) if any(s.startswith(text[-n:]) for s in self.stop)), 0)
