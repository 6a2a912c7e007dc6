"""stopping_criteria of llama-cpp-python: functions that say, before each token, whether the text ends there.

They are asked as a logits_processor is, with the tokens so far and the scores of the next one. Where one says yes, its
request ends with an error of ours, and the text is what had come until then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .._errors import RequestError
from .processors import Scores
from .results import Chunk, TokenLogprob, Usage

Ids = npt.NDArray[np.int32]


class _Ended(Exception):
    """One of the functions has said so."""


class Criteria:
    """The functions of one request. Raises: RequestError for what is none."""

    def __init__(self, given: Any) -> None:
        self.functions: list[Any] = list(given) if isinstance(given, Sequence) else [given]
        for function in self.functions:
            if not callable(function):
                raise RequestError(
                    f"stopping_criteria is a function (tokens, logits) -> bool, or a list of them, not {function!r:.60}"
                )
        self.tokens: Ids = np.empty(0, np.int32)  # of the prompt and of the text, at the last call
        self.n_prompt: int | None = None

    def __call__(self, tokens: Ids, scores: Scores) -> Scores:
        self.tokens = tokens
        if self.n_prompt is None:
            self.n_prompt = len(tokens)
        said = [bool(function(tokens, scores)) for function in self.functions]  # as there: each is asked
        if any(said):
            raise _Ended
        return scores

    def until(self, chunks: Iterable[Chunk], detokenize: Callable[..., bytes]) -> Iterator[Chunk]:
        """The chunks of an answer that has this among its processors, and one with what had not been sent yet of its
        text where a function ended it: the beginning of a stop text, and of a character."""
        sent = ""
        try:
            for chunk in chunks:
                sent += chunk.text
                yield chunk
        except _Ended:
            n_prompt = self.n_prompt or 0
            prompt, tokens = self.tokens[:n_prompt].tolist(), self.tokens[n_prompt:].tolist()
            text = detokenize(tokens, prev_tokens=prompt).decode("utf-8", "replace")
            rest = text[len(sent) :] if text.startswith(sent) else ""
            yield Chunk(rest, finish_reason="stop", usage=Usage(n_prompt, 0, len(tokens)))


def joined(chunks: Iterable[Chunk]) -> Chunk:
    """All of a text as one chunk."""
    text, logprobs, last = "", list[TokenLogprob](), Chunk("")
    for chunk in chunks:
        text += chunk.text
        logprobs += chunk.logprobs or ()
        last = chunk
    return Chunk(text, logprobs=tuple(logprobs) or None, finish_reason=last.finish_reason, usage=last.usage)
