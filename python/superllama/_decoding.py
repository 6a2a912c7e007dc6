"""Batches in, logits and embeddings out: the part of a context that computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ._batch import Batch, Outputs
from ._context_base import ContextBase
from ._errors import CancelledError, ContextError, DecodeError, PromptError, PromptTooLongError
from ._native import collected_errors, ffi, last_error, lib, reason
from ._text import check_tokens

if TYPE_CHECKING:
    from numpy.typing import NDArray


class Decoding(ContextBase):
    """decode(), and views on what it computed."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._n_outputs = 0  # rows of logits that the last batch left
        self._cancel_count = 0
        self._batch = Batch(min(self._n_batch, self._n_ubatch))
        self._pending: dict[int, int] = {}  # by sequence: a token that was generated, but not yet decoded

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
        an error the sequence is as it was, where the model allows to remove tokens; elsewhere it keeps the batches of
        n_ubatch tokens before the error, and seq_pos_max() says up to where.
        """
        self._check_seq(seq)
        cancel_count = self._cancel_count
        with self._use() as c:
            self._pending.pop(seq, None)
            self._decode(c, tokens, seq, pos, logits, cancel_count)

    def cancel(self) -> None:
        """Stop what another thread is doing with this context: generate() ends with finish reason "cancelled",
        decode() and embed() raise CancelledError. Without effect on what begins afterwards."""
        self._cancel_count += 1
        self._abort_flag[0] = 1

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
        try:
            # batches of n_ubatch compute the same as longer ones, and let Ctrl-C through between them
            for i in range(0, len(tokens), self._batch.n_max):
                part = tokens[i : i + self._batch.n_max]
                last = i + len(part) == len(tokens)
                self._decode_batch(c, self._batch.fill(part, seq, begin + i, outputs if last else False), cancel_count)
        except BaseException:
            lib.llama_memory_seq_rm(self._memory, seq, begin, -1)
            raise
        self._n_outputs = len(tokens) if outputs == "all" else 1 if outputs == "last" else 0

    def _decode_batch(self, c: Any, batch: Any, cancel_count: int) -> None:
        self._abort_flag[0] = 0
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
        why = last_error()
        if why and any(line.endswith(why) for line in errors):  # else it is of an earlier call
            raise DecodeError(why)
        raise DecodeError(
            f"the library could not decode {batch.n_tokens} tokens ({result}): {reason(errors, 'no reason given')}"
        )

    def _next_pos(self, seq: int) -> int:
        return int(lib.llama_memory_seq_pos_max(self._memory, seq)) + 1

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

    def embed(self, texts: str | Sequence[str], *, seq: int = 0, normalize: bool = True) -> NDArray[np.float32]:
        """Embeddings of texts, shape (n_texts, n_embd); of one text, shape (n_embd,). A copy.

        Sequence `seq` is used and left empty. The context must be made with embeddings=True, and with a
        pooling (such as "mean" or "last") unless the model has its own. `normalize` scales to length 1.

        Raises: ContextError if the context cannot, PromptError for an empty text, PromptTooLongError for one
        of more than n_ubatch tokens, CancelledError after cancel().
        """
        self._check_seq(seq)
        if not self.params.embeddings:
            raise ContextError("this context keeps no embeddings; make it with embeddings=True")
        cancel_count = self._cancel_count
        rows = []
        for text in [texts] if isinstance(texts, str) else texts:
            tokens = self.model.tokenize(text)
            with self._use() as c:
                if lib.llama_pooling_type(c) == lib.LLAMA_POOLING_TYPE_NONE:
                    raise ContextError("embed() needs a pooling, and the model has none: pooling='mean' or 'last'")
                lib.llama_memory_seq_rm(self._memory, seq, -1, -1)
                self._pending.pop(seq, None)
                self._decode(c, tokens, seq, 0, "all", cancel_count)
                rows.append(self._embeddings(c, seq).copy())
                lib.llama_memory_seq_rm(self._memory, seq, -1, -1)
        result = np.stack(rows) if rows else np.empty((0, self.model.n_embd), np.float32)
        if normalize:
            result = result / np.maximum(np.linalg.norm(result, axis=-1, keepdims=True), 1e-12)
        return result[0] if isinstance(texts, str) else result
