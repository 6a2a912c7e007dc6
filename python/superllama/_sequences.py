"""Sequences of a context: how long they are, removing, copying and shifting tokens."""

from __future__ import annotations

from ._context_base import integer
from ._decoding import Decoding
from ._errors import ContextError
from ._metrics import SequenceMetrics
from ._native import last_error, lib
from ._pages import KvPages, pages_of, sequences_of


class Sequences(Decoding):
    """Operations on what the context holds. Positions count from 0; ranges are [begin, end), None = to the end."""

    # ---------------------------------------------------------------- tokens

    def seq_pos_min(self, seq: int = 0) -> int:
        """The first position that the sequence holds, -1 if it is empty. Above 0 in sliding-window caches."""
        self._check_seq(seq)
        with self._use():
            return int(lib.llama_memory_seq_pos_min(self._memory, seq))

    def seq_pos_max(self, seq: int = 0) -> int:
        """The last position that the sequence holds, -1 if it is empty."""
        self._check_seq(seq)
        with self._use():
            return self._next_pos(seq) - 1

    def kv_pages(self) -> KvPages:
        """What the paged KV cache holds, by tier and by sequence; `paged` is False for the standard cache."""
        with self._use() as c:
            return pages_of(c, self.n_seq_max)

    def sequences(self) -> list[SequenceMetrics]:
        """What each sequence, by its number, has computed and holds now.

        Any thread may ask `metrics().sequences`, which leaves out those that have done nothing, and where what they
        hold may be that of a moment ago.

        Raises: ContextError if the library fails.
        """
        with self._use() as c:
            return sequences_of(c)

    def prefetch(self, seq: int) -> int:
        """Restore the pages of a sequence that is about to run, as many as the budget takes; with
        async_prefetch in worker threads. Returns how many pages were asked for.
        """
        self._check_seq(seq)
        with self._use() as c:
            n = int(lib.superllama_kv_prefetch(c, seq))
        if n < 0:
            raise ContextError(f"pages of sequence {seq} cannot be restored: {last_error()}")
        return n

    def seq_remove(self, seq: int = 0, begin: int = 0, end: int | None = None) -> None:
        """Remove tokens of a sequence.

        Raises: ContextError, and nothing is changed, if the model (a recurrent one) can only forget whole sequences,
        or if what is left could not be gone on with: a cache of a sliding window (swa_full=False, or a loaded state)
        holds the last tokens only, and the window before `begin` is not among them.
        """
        self._check_seq(seq)
        begin, c_end = _range(begin, end)
        with self._use():
            next_pos, first = self._next_pos(seq), self._first.get(seq, 0)
            is_tail = c_end == -1 or c_end >= next_pos
            if is_tail and begin < next_pos:
                self._check_window(seq, begin, first, f"sequence {seq} cannot go back to position {begin}")
            if not lib.llama_memory_seq_rm(self._memory, seq, begin or -1, c_end):
                raise ContextError(
                    "this model's memory cannot remove a part of a sequence; remove all of it. Nothing was changed"
                )
            self._pending.pop(seq, None)
            if is_tail and begin <= first:
                self._forget(seq)
            elif is_tail:
                self._note_cut(seq, begin)
            else:
                self._history.pop(seq, None)
                if begin <= first:
                    self._first[seq] = max(first, c_end)

    def seq_copy(self, source: int, target: int, begin: int = 0, end: int | None = None) -> None:
        """Make `target` hold the same tokens as `source`, instead of what it held. No data is copied where the
        context shares its cells (kv_unified=True); elsewhere only a whole sequence can be copied.

        Raises: ContextError, and nothing is changed, for a part where only a whole sequence can be copied, or of which
        a sliding window is not held.
        """
        self._check_seq(source), self._check_seq(target)
        begin, c_end = _range(begin, end)
        whole = begin == 0 and c_end == -1
        with self._use() as c:
            if source == target:
                return
            if not whole and (self._has_state or not self.params.kv_unified):
                raise ContextError("this context copies whole sequences only; make it with kv_unified=True for parts")
            next_pos = self._next_pos(source)
            next_pos = next_pos if c_end == -1 else min(next_pos, c_end)
            first = max(begin, self._first.get(source, 0))
            if not whole:
                what = f"sequence {source} cannot be copied up to position {next_pos}"
                self._check_window(source, next_pos, first, what)
            self._forget(target)
            lib.llama_memory_seq_cp(self._memory, source, target, -1 if whole else begin, c_end)
            lib.llama_synchronize(c)
            if first:
                self._first[target] = first
            elif source in self._history:
                self._history[target] = self._history[source][:next_pos]
            if whole and source in self._pending:
                self._pending[target] = self._pending[source]

    def seq_keep(self, seq: int) -> None:
        """Remove all other sequences."""
        self._check_seq(seq)
        with self._use():
            for other in set(range(self.n_seq_max)) - {seq}:
                self._forget(other)

    def seq_shift(self, seq: int, delta: int, begin: int = 0, end: int | None = None) -> None:
        """Add `delta` to the positions of tokens; those that would fall below 0 are removed.

        Raises: ContextError, and nothing is changed, if the model cannot, if `delta` is larger than the context, or if
        the shift would bring tokens that are not held into a sliding window.
        """
        self._check_seq(seq)
        begin, c_end = _range(begin, end)
        if abs(integer(delta, "delta")) > self._n_ctx:
            raise ContextError(f"a shift by {delta} is more than the {self._n_ctx} positions of the context")
        with self._use():
            if not lib.llama_memory_can_shift(self._memory):
                raise ContextError("this model's memory cannot shift positions")
            next_pos, first = self._next_pos(seq), self._first.get(seq, 0)
            pos_min = int(lib.llama_memory_seq_pos_min(self._memory, seq))
            new_first = max(0, first + delta) if begin <= first else first
            if c_end == -1 or c_end >= next_pos:
                new_min = max(0, pos_min + delta) if begin <= pos_min else pos_min
                what = f"sequence {seq} cannot be shifted by {delta}"
                self._check_window(seq, next_pos + delta, new_first, what, new_min)
            lib.llama_memory_seq_add(self._memory, seq, begin, c_end, delta)
            self._history.pop(seq, None)
            self._first[seq] = new_first

    def clear(self) -> None:
        """Remove all tokens of all sequences."""
        with self._use():
            self._clear()

    def _clear(self) -> None:
        lib.llama_memory_clear(self._memory, False)
        self._pending.clear()
        self._first.clear()
        self._history.clear()
        self._n_outputs = 0


def _range(begin: int, end: int | None) -> tuple[int, int]:
    """Checked, with the library's -1 for an open end."""
    integer(begin, "a position"), integer(0 if end is None else end, "a position")
    if begin < 0 or (end is not None and end < begin) or max(begin, end or 0) >= 2**31:
        raise ContextError(f"[{begin}, {end}) is no range of positions")
    return begin, -1 if end is None else end
