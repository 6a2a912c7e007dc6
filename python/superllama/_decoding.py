"""Batches in, logits and embeddings out: the part of a context that computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ._batch import Batch, Outputs
from ._context_base import integer
from ._errors import CancelledError, ContextError, DecodeError, PromptError, PromptTooLongError
from ._going_back import GoingBack
from ._native import collected_errors, ffi, last_error, lib, reason
from ._text import check_tokens, is_text, is_token, token_list
from ._waiting import in_main_thread

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Decoding(GoingBack):
    """decode(), and views on what it computed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._n_outputs = 0  # rows of logits that the last batch left
        self._cancel_count = 0
        self._batch = Batch(min(self._n_batch, self._n_ubatch))

    # ---------------------------------------------------------------- decode

    def decode(
        self,
        tokens: Sequence[int],
        *,
        seq: int = 0,
        pos: int | None = None,
        logits: Literal["last", "all", False] = "last",
    ) -> None:
        """Append tokens to a sequence and compute them.

        `pos` is the position of the first one, by default the end of the sequence. `logits` says of which
        tokens logits() and embeddings() shall have rows: the last, all (at most n_ubatch tokens then), none.

        Raises: PromptError for no tokens or tokens that are not in the vocabulary, PromptTooLongError if they
        do not fit, CancelledError after cancel() from another thread, DecodeError if the library fails. After
        an error the sequence is as it was, also where a sliding window or a recurrent state went on meanwhile; only a
        single token, or a batch of at most n_ubatch, may stay decoded in a recurrent model: seq_pos_max() tells.
        """
        self._check_seq(seq)
        if logits is not False and not (isinstance(logits, str) and logits in ("last", "all")):
            raise PromptError(f"logits is 'last', 'all' or False, not {logits!r}")
        tokens = token_list(tokens, "decode() takes a list of tokens; for a text: decode(model.tokenize(text))")
        if pos is not None:
            integer(pos, "a position")
        cancel_count = self._cancel_count
        with self._use() as c:
            self._decode(c, tokens, seq, pos, logits, cancel_count)
            self._pending.pop(seq, None)

    def cancel(self) -> None:
        """Stop what another thread is doing with this context: generate() ends with finish reason "cancelled",
        decode() and embed() raise CancelledError. Without effect on what begins afterwards."""
        self._cancel_count += 1
        super().cancel()

    def _decode(
        self, c: Any, tokens: Sequence[int], seq: int, pos: int | None, outputs: Outputs, cancel_count: int
    ) -> None:
        """The lock is held. `cancel_count` is what it was when the caller's work began."""
        begin = self._next_pos(seq)
        if pos is not None and pos != begin and (begin > 0 or pos < 0):
            raise DecodeError(
                f"sequence {seq} goes on at position {begin}, not {pos}; remove tokens with seq_remove() first"
            )
        begin = begin if pos is None else pos
        self._check_room(tokens, seq, begin)
        if self.params.embeddings:
            outputs = "all"  # the library insists
        if (outputs == "all" or self._at_once) and len(tokens) > self._batch.n_max:
            raise PromptTooLongError(
                f"{len(tokens)} tokens that must be computed at once do not fit into one batch of {self._batch.n_max} "
                "tokens; shorten the text, or make the context with a larger n_ubatch and n_batch",
                len(tokens),
                self._batch.n_max,
            )
        self._n_outputs = 0
        way_back = self._way_back(c, seq, begin, len(tokens))
        try:
            # batches of n_ubatch compute the same as longer ones, and let Ctrl-C through between them
            for i in range(0, len(tokens), self._batch.n_max):
                part = tokens[i : i + self._batch.n_max]
                last = i + len(part) == len(tokens)
                self._decode_batch(c, self._batch.fill(part, seq, begin + i, outputs if last else False), cancel_count)
            self._note_decoded(seq, begin, tokens)
        except BaseException:
            if not self._go_back(c, seq, begin, way_back):
                self._history.pop(seq, None)
            raise
        self._n_outputs = len(tokens) if outputs == "all" else 1 if outputs == "last" else 0

    def _decode_batch(self, c: Any, batch: Any, cancel_count: int) -> None:
        self._abort_flag.set, self._abort_flag.listens = 0, in_main_thread()
        if self._cancel_count != cancel_count:  # looked at after the flag is cleared: cancel() sets it last
            raise CancelledError("decoding was cancelled")
        with collected_errors() as errors:
            result = lib.llama_decode(c, batch)
        if result == 0:
            return
        if result == 1:
            raise DecodeError(
                f"no room for {batch.n_tokens} tokens: the sequences of this context share {self._n_ctx} cells; remove "
                "tokens with seq_remove(), or make the context with a larger n_ctx"
            )
        if result == 2:
            raise CancelledError("decoding was cancelled")
        if why := last_error():
            raise DecodeError(why)
        raise DecodeError(
            f"the library could not decode {batch.n_tokens} tokens ({result}): {reason(errors, 'no reason given')}"
        )

    def _check_room(self, tokens: Sequence[int], seq: int, begin: int) -> None:
        if len(tokens) == 0:
            raise PromptError("there are no tokens to decode; the prompt is empty")
        check_tokens(tokens, self.model.n_vocab)
        n_ctx = self._n_ctx_seq if self._memory else min(self._n_ctx_seq, self.model.n_ctx_train)
        n_room = n_ctx - begin
        if len(tokens) > n_room:
            held = f", of which sequence {seq} holds {begin} already" if begin else ""
            raise PromptTooLongError(
                f"the prompt has {len(tokens)} tokens, but the context has {n_ctx}{held}; shorten it, or "
                f"make the context with n_ctx={begin + len(tokens)} or more (the model was trained with "
                f"{self.model.n_ctx_train})",
                len(tokens),
                n_room,
            )

    # ---------------------------------------------------------------- results

    def logits(self) -> NDArray[np.float32]:
        """The logits of the last batch, shape (n_outputs, n_vocab), rows in the order of its tokens.

        A read-only view of the library's memory, not a copy: the next decode, generate or embed call writes
        over it, and after close() it must not be touched. `.copy()` keeps it.

        Raises: ContextError if the last batch had no outputs.
        """
        with self._use() as c:
            pointer = lib.llama_get_logits(c) if self._n_outputs else ffi.NULL
            if pointer == ffi.NULL:
                raise ContextError("there are no logits: nothing was decoded, or with logits=False")
            return self._view(pointer, (self._n_outputs, self.model.n_vocab))

    def embeddings(self, seq: int = 0) -> NDArray[np.float32]:
        """The embeddings of the last batch: shape (n_outputs, n_embd), one row for each token, without pooling;
        shape (n_embd,) of sequence `seq` with it (for pooling "rank": the scores of the classes).

        A view, as logits() is. Raises: ContextError if the context has none.
        """
        self._check_seq(seq)
        with self._use() as c:
            if not self.params.embeddings:
                raise ContextError("this context keeps no embeddings; make it with embeddings=True")
            return self._embeddings(c, seq)

    def _embeddings(self, c: Any, seq: int) -> NDArray[np.float32]:
        shape: tuple[int, ...]
        pooling = lib.llama_pooling_type(c)
        if pooling == lib.LLAMA_POOLING_TYPE_NONE:
            pointer, shape = lib.llama_get_embeddings(c), (self._n_outputs, self.model.n_embd)
        else:
            pointer, shape = lib.llama_get_embeddings_seq(c, seq), (self.model.n_embd,)
            if pooling == lib.LLAMA_POOLING_TYPE_RANK:
                with self.model._use() as m:
                    shape = (int(lib.llama_model_n_cls_out(m)),)
        if pointer == ffi.NULL or not self._n_outputs:
            raise ContextError("there are no embeddings: nothing was decoded")
        return self._view(pointer, shape)

    def _view(self, pointer: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
        # the view's base holds this context, so that it is not freed while somebody looks at it
        owner = ffi.gc(pointer, lambda _, keep=self: None)
        view = np.frombuffer(ffi.buffer(owner, int(np.prod(shape)) * 4), dtype=np.float32).reshape(shape)
        view.flags.writeable = False
        return view

    def embed(
        self,
        texts: str | bytes | Sequence[int] | Sequence[str | bytes | Sequence[int]],
        *,
        seq: int = 0,
        normalize: bool | None = None,
    ) -> NDArray[np.float32]:
        """Embeddings of texts, shape (n_texts, n_embd); of one text, shape (n_embd,). A copy.

        A text may be given as the list of its tokens. Sequence `seq` is used and left empty. The context must be made
        with embeddings=True, and with a pooling (such as "mean" or "last") unless the model has its own. `normalize`
        scales to length 1, and is the default.

        Of a reranker (pooling "rank") the rows are the scores of its classes, often a single one, as the model gives
        them: scaled to length 1 they would say nothing.

        Raises: ContextError if the context cannot, or if scores shall be normalized; PromptError for an empty text, or
        what is none, PromptTooLongError for one of more than n_ubatch tokens, CancelledError after cancel().
        """
        self._check_seq(seq)
        if not self.params.embeddings:
            raise ContextError("this context keeps no embeddings; make it with embeddings=True")
        cancel_count = self._cancel_count
        given, single = _texts(texts)
        rows = []
        with self._use() as c, self.model._use() as m:
            pooling = lib.llama_pooling_type(c)
            ranks = pooling == lib.LLAMA_POOLING_TYPE_RANK
            width = int(lib.llama_model_n_cls_out(m)) if ranks else self.model.n_embd
        if pooling == lib.LLAMA_POOLING_TYPE_NONE:
            raise ContextError("embed() needs a pooling, and the model has none: pooling='mean' or 'last'")
        if ranks and normalize:
            raise ContextError(
                "this model ranks: embed() returns scores, and scaled to length 1 they would all be 1 or -1"
            )
        for text in given:
            tokens = self.model.tokenize(text) if is_text(text) else token_list(text)
            with self._use() as c:
                self._forget(seq)
                try:
                    self._decode(c, tokens, seq, 0, "all", cancel_count)
                    rows.append(self._embeddings(c, seq).copy())
                finally:
                    self._forget(seq)
        result = np.stack(rows) if rows else np.empty((0, width), np.float32)
        if normalize is not False and not ranks:
            result = result / np.maximum(np.linalg.norm(result, axis=-1, keepdims=True), 1e-12)
        return result[0] if single else result


def _texts(texts: Any) -> tuple[list[Any], bool]:
    """What embed() was given, as a list, and whether it was a single text. Raises: PromptError."""
    if is_text(texts):
        return [texts], True
    try:
        given = list(texts)
    except TypeError:
        raise PromptError(f"embed() takes a text, its tokens, or a list of them; not {texts!r}") from None
    if given and all(is_token(item) for item in given):
        return [given], True
    return given, False
