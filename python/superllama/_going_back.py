"""Going back: what a cache can undo, known before anything is changed, and undoing what failed.

A cache of a sliding window forgets what lies before the window, and a recurrent state has no positions at all. Asked to
remove tokens, the library removes those that it finds, and says that this went well: the sequence then goes on without
the tokens that its window should hold. So whether the window of the next token is there is looked up first.
"""

from __future__ import annotations

from array import array
from typing import Any

from ._context_base import ContextBase
from ._errors import ContextError, DecodeError
from ._native import ffi, lib


class GoingBack(ContextBase):
    """Which positions the sequences hold, and the way back to an earlier one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        with self.model._use() as m:
            self._n_swa = int(lib.llama_model_n_swa(m))
            self._has_state = bool(lib.llama_model_is_recurrent(m) or lib.llama_model_is_hybrid(m))
        self._first: dict[int, int] = {}  # by sequence: the position that it begins with, where that is not 0
        self._history: dict[int, array[int]] = {}  # by sequence: its tokens from 0 on, where they are known
        self._pending: dict[int, int] = {}  # by sequence: a token that was generated, but not yet decoded

    def cancel(self) -> None:
        """Stop what another thread is doing with this context."""
        if not self._has_state:  # a graph that ends in the middle leaves half a state; it stops after this one
            super().cancel()

    # ---------------------------------------------------------------- positions

    def _next_pos(self, seq: int) -> int:
        return int(lib.llama_memory_seq_pos_max(self._memory, seq)) + 1

    def _lacks_window(self, seq: int, next_pos: int, first: int, pos_min: int | None = None) -> int | None:
        """The first position that a token at `next_pos` looks at and the cache does not hold, None if there is none.
        `first` is the position that the sequence shall begin with."""
        if not self._n_swa or next_pos <= first:
            return None
        if pos_min is None:
            pos_min = int(lib.llama_memory_seq_pos_min(self._memory, seq))
        needed = max(first, next_pos - self._n_swa + 1)
        return needed if pos_min > needed else None

    def _check_window(self, seq: int, next_pos: int, first: int, what: str, pos_min: int | None = None) -> None:
        """Raises: ContextError, before anything is changed, if the cache cannot go on at `next_pos`."""
        if (needed := self._lacks_window(seq, next_pos, first, pos_min)) is not None:
            held = int(lib.llama_memory_seq_pos_min(self._memory, seq))
            if self._has_state:  # which a larger cache of the window does not bring back
                try_this = ", as the recurrent state of this model cannot go back at all"
            elif self.params.swa_full:
                try_this = "; the state that was loaded into it holds no more than that"
            else:
                try_this = ", or make the context with swa_full=True"
            raise ContextError(
                f"{what}: a token at position {next_pos} looks {self._n_swa} positions back, to {needed}, and the "
                f"cache of that window holds sequence {seq} from {held} on. Nothing was changed; remove the whole "
                f"sequence and decode its tokens again{try_this}"
            )

    # ---------------------------------------------------------------- bookkeeping

    def _forget(self, seq: int) -> None:
        """Empty a sequence."""
        lib.llama_memory_seq_rm(self._memory, seq, -1, -1)
        self._pending.pop(seq, None)
        self._first.pop(seq, None)
        self._history.pop(seq, None)

    def _note_decoded(self, seq: int, begin: int, tokens: Any) -> None:
        if begin == 0:
            self._first.pop(seq, None)
            self._history[seq] = array("i", tokens)
        elif seq in self._history and len(self._history[seq]) == begin:
            self._history[seq].extend(tokens)
        else:
            self._history.pop(seq, None)

    def _note_cut(self, seq: int, end: int) -> None:
        """Tokens from `end` on were removed."""
        if seq in self._history:
            del self._history[seq][end:]

    # ---------------------------------------------------------------- undoing

    def _way_back(self, c: Any, seq: int, begin: int, n_tokens: int) -> Any:
        """What _go_back() needs after the decoding of so many tokens: a copy of the part of the cache that forgets, if
        it may forget. That is a window or a state, not the whole sequence."""
        forgets = self._has_state or (self._n_swa and not self.params.swa_full)
        if not begin or not forgets or n_tokens <= self._n_ubatch:  # within one ubatch no window is written over
            return None
        flags = lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
        lib.llama_synchronize(c)
        size = lib.llama_state_seq_get_size_ext(c, seq, flags)
        data = ffi.new("uint8_t[]", max(size, 1))
        if lib.llama_state_seq_get_data_ext(c, data, size, seq, flags) != size:
            raise DecodeError(f"sequence {seq} cannot be copied, so its way back would be lost if decoding failed")
        return data

    def _go_back(self, c: Any, seq: int, begin: int, saved: Any = None) -> bool:
        """Make the sequence end before `begin` again; whether that could be done. Else nothing is changed."""
        if begin == self._next_pos(seq):
            return True
        if saved is not None:
            flags = lib.LLAMA_STATE_SEQ_FLAGS_PARTIAL_ONLY
            if lib.llama_state_seq_set_data_ext(c, saved, len(saved), seq, flags) == 0:
                return False
        elif begin and self._lacks_window(seq, begin, self._first.get(seq, 0)) is not None:
            return False
        if not lib.llama_memory_seq_rm(self._memory, seq, begin or -1, -1):
            return False
        self._note_cut(seq, begin)
        return True
