"""How likely a model finds a text that is given, instead of one that it writes."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ._context_base import integer
from ._engine.results import TokenLogprob
from ._errors import ContextError, PromptError
from ._native import lib
from ._states import States
from ._text import check_tokens, is_text, token_list

if TYPE_CHECKING:
    from numpy.typing import NDArray

WINDOW = 512  # tokens


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """How well a model foresees a text: as if it chose among so many tokens that are equally likely, every time."""

    value: float  # 1 or more; less is better
    error: float  # standard error of the value
    n_tokens: int  # that were foreseen


class Scoring(States):
    """Log-probabilities of texts, and what is made of them."""

    def score(
        self, text: str | bytes | Sequence[int], *, after: str | bytes | Sequence[int] = "", top: int = 0, seq: int = 0
    ) -> tuple[TokenLogprob, ...]:
        """The log-probability of each token of a text, given those before it.

        Both may be tokens. `after` is what comes before the text and is not scored itself: the question to an answer.
        Without it, and without a token of the vocabulary that begins every text, nothing comes before the first token,
        which is left out. `top` is how many of the most likely tokens to tell in the place of each. The sum of
        `logprob` is the log-probability of the text. Sequence `seq` is used and left empty.

        Raises: ContextError if the model does not go from token to token, PromptError for an empty text or what is
        none, PromptTooLongError if both do not fit, CancelledError after cancel().
        """
        self._check_seq(seq)
        if integer(top, "top") < 0:
            raise PromptError(f"top is how many tokens to tell in place of each, 0 or more: {top}")
        self._check_scores()
        cancel_count = self._cancel_count
        before = self._begun(after) if is_text(after) else token_list(after)
        if not is_text(text):
            own = token_list(text)
        elif before:
            own = self.model.tokenize(text, add_special=False)
        else:
            own = self._begun(text)
        if not own:
            raise PromptError("there is nothing to score: the text is empty")
        tokens = [*before, *own]
        check_tokens(tokens, self.model.n_vocab)
        first = max(0, len(before) - 1)  # behind it comes the first that is scored
        with self._use() as c, contextlib.closing(self._rows(c, tokens, first, seq, cancel_count)) as rows:
            return tuple(self._told(tokens[i + 1], row, top) for i, row in rows if i + 1 < len(tokens))

    def perplexity(self, text: str | bytes, *, window: int | None = None, seq: int = 0) -> Perplexity:
        """The perplexity of a text, as superllama-perplexity measures it: in windows of so many tokens (512, or what
        the context holds), of which the second half is foreseen. Sequence `seq` is used and left empty.

        Raises: as score(); PromptError for a text of less than two windows.
        """
        self._check_seq(seq)
        window = min(WINDOW, self.n_ctx_seq) if window is None else integer(window, "a window")
        if not 4 <= window <= self.n_ctx_seq:
            raise PromptError(f"a window has 4 tokens or more, and no more than this context: {self.n_ctx_seq}")
        self._check_scores()
        cancel_count = self._cancel_count
        tokens = self.model.tokenize(text, parse_special=False)
        if len(tokens) < 2 * window:
            raise PromptError(
                f"a text of {len(tokens)} tokens is less than two windows of {window}: take a longer text, or a "
                "shorter window"
            )
        losses: list[float] = []
        with self._use() as c:
            for begin in range(0, len(tokens) - window + 1, window):
                part = tokens[begin : begin + window]
                if lib.llama_vocab_get_add_bos(self.model._vocab):
                    part[0] = tokens[0]
                with contextlib.closing(self._rows(c, part, window // 2, seq, cancel_count)) as rows:
                    losses += [-float(row[part[i + 1]]) for i, row in rows if i + 1 < window]
        mean = math.fsum(losses) / len(losses)
        spread = math.fsum(loss * loss for loss in losses) / len(losses) - mean * mean
        value = math.exp(mean)
        return Perplexity(value, value * math.sqrt(max(0.0, spread) / (len(losses) - 1)), len(losses))

    def _check_generates(self) -> None:
        with self.model._use() as m:
            by_token = self._memory and not self._at_once and not lib.llama_model_has_encoder(m)
            if not by_token or lib.llama_model_is_diffusion(m):
                raise ContextError(
                    f"{self.model.path.name} ({self.model.description}) does not generate token by token; embed() and "
                    "decode() may be what it is for"
                )

    def _check_scores(self) -> None:
        self._check_generates()
        if self.params.embeddings:
            raise ContextError("this context keeps no logits; make it without embeddings=True")

    def _begun(self, text: str | bytes) -> list[int]:
        """The tokens of a text that begins and does not end."""
        tokens = self.model.tokenize(text)
        with self.model._use():
            ends = lib.llama_vocab_get_add_eos(self.model._vocab)
        return tokens[:-1] if ends else tokens

    def _rows(
        self, c: Any, tokens: list[int], first: int, seq: int, cancel_count: int
    ) -> Generator[tuple[int, NDArray[np.float64]], None, None]:
        """From the first token on: its place, and the log-probability of every token to come behind it. The lock is
        held."""
        self._forget(seq)
        try:
            if first > 0:
                self._decode(c, tokens[:first], seq, 0, False, cancel_count)
            for begin in range(first, len(tokens), self._batch.n_max):
                part = tokens[begin : begin + self._batch.n_max]
                self._decode(c, part, seq, begin, "all", cancel_count)
                pointer = lib.llama_get_logits(c)
                logits = self._view(pointer, (len(part), self.model.n_vocab))
                for i in range(len(part)):
                    row = logits[i].astype(np.float64)
                    row -= row.max()
                    yield begin + i, row - np.log(np.exp(row).sum())
        finally:
            self._forget(seq)

    def _told(self, token: int, row: NDArray[np.float64], top: int) -> TokenLogprob:
        top = min(top, len(row))
        most = np.argpartition(-row, top - 1)[:top] if top else np.empty(0, np.int64)
        most = most[np.lexsort((most, -row[most]))]
        tell = [TokenLogprob(int(t), self.model.detokenize([int(t)]), float(row[t])) for t in (token, *most)]
        return dataclasses.replace(tell[0], top=tuple(tell[1:]))
