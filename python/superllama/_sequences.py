"""Sequences of a context: how long they are, removing, copying and shifting tokens, saving and loading them."""

from __future__ import annotations

import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

from ._decoding import Decoding
from ._errors import ContextError, StateError
from ._native import collected_errors, ffi, last_error, lib, reason, upstream_build
from ._pages import KvPages, pages_of

# a saved state: MAGIC, length of the JSON header (u32), the header, the library's data
MAGIC = b"superllama-state-1\n"
LENGTH = struct.Struct("<I")


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

        Raises: ContextError if the model (a recurrent one) can only forget whole sequences.
        """
        self._check_seq(seq)
        begin, c_end = _range(begin, end)
        with self._use():
            self._pending.pop(seq, None)
            if not lib.llama_memory_seq_rm(self._memory, seq, begin or -1, c_end):
                raise ContextError("this model's memory cannot remove a part of a sequence; remove all of it")

    def seq_copy(self, source: int, target: int, begin: int = 0, end: int | None = None) -> None:
        """Make `target` hold the same tokens as `source`, instead of what it held. No data is copied where the
        context shares its cells (kv_unified=True); elsewhere only a whole sequence can be copied.
        """
        self._check_seq(source), self._check_seq(target)
        begin, c_end = _range(begin, end)
        whole = begin == 0 and c_end == -1
        with self._use() as c:
            if source == target:
                return
            with self.model._use() as m:
                state_only = lib.llama_model_is_recurrent(m) or lib.llama_model_is_hybrid(m)
            if not whole and (state_only or not self.params.kv_unified):
                raise ContextError("this context copies whole sequences only; make it with kv_unified=True for parts")
            self._pending.pop(target, None)
            lib.llama_memory_seq_rm(self._memory, target, -1, -1)
            lib.llama_memory_seq_cp(self._memory, source, target, -1 if whole else begin, c_end)
            lib.llama_synchronize(c)
            if whole and source in self._pending:
                self._pending[target] = self._pending[source]

    def seq_keep(self, seq: int) -> None:
        """Remove all other sequences."""
        self._check_seq(seq)
        with self._use():
            for other in set(range(self.n_seq_max)) - {seq}:
                lib.llama_memory_seq_rm(self._memory, other, -1, -1)
            self._pending = {s: token for s, token in self._pending.items() if s == seq}

    def seq_shift(self, seq: int, delta: int, begin: int = 0, end: int | None = None) -> None:
        """Add `delta` to the positions of tokens; those that would fall below 0 are removed.

        Raises: ContextError if the model cannot, or `delta` is larger than the context.
        """
        self._check_seq(seq)
        begin, c_end = _range(begin, end)
        if abs(delta) > self._n_ctx:
            raise ContextError(f"a shift by {delta} is more than the {self._n_ctx} positions of the context")
        with self._use():
            if not lib.llama_memory_can_shift(self._memory):
                raise ContextError("this model's memory cannot shift positions")
            lib.llama_memory_seq_add(self._memory, seq, begin, c_end, delta)

    def clear(self) -> None:
        """Remove all tokens of all sequences."""
        with self._use():
            self._clear()

    def _clear(self) -> None:
        lib.llama_memory_clear(self._memory, False)
        self._pending.clear()
        self._n_outputs = 0

    # ---------------------------------------------------------------- state

    def state_save(self, seq: int | None = None) -> bytes:
        """What the context holds, or one sequence of it, as bytes: about as many as its part of the KV cache.

        A generation goes on after state_load() exactly as it would have: generate(..., keep=True).
        """
        if seq is not None:
            self._check_seq(seq)
        with self._use() as c, collected_errors() as errors:
            lib.llama_synchronize(c)
            size = lib.llama_state_get_size(c) if seq is None else lib.llama_state_seq_get_size(c, seq)
            data = ffi.new("uint8_t[]", max(size, 1))
            n = (
                lib.llama_state_get_data(c, data, size)
                if seq is None
                else lib.llama_state_seq_get_data(c, data, size, seq)
            )
            if n == 0:
                raise StateError(f"the state cannot be saved: {reason(errors, 'the library gives no reason')}")
            pending = dict(self._pending) if seq is None else {k: v for k, v in self._pending.items() if k == seq}
        buffer = ffi.buffer(data, n)
        header = json.dumps(
            {**self._identity(), "seq": seq, "pending": list(pending.items()), "bytes": n, "crc32": zlib.crc32(buffer)}
        ).encode()
        return b"".join([MAGIC, LENGTH.pack(len(header)), header, buffer])

    def state_load(self, state: bytes, seq: int | None = None) -> None:
        """Hold again what state_save() saved. The state of one sequence can be loaded into any sequence.

        Raises: StateError if the state is damaged, or of another model; the context keeps what it held. If
        the library then refuses it (another cache type, a smaller context), what it held is removed.
        """
        header, data = _unpack(state)
        if (header["seq"] is None) != (seq is None):
            kinds = ("the whole context", "one sequence")
            raise StateError(
                f"this is the state of {kinds[header['seq'] is not None]}; load it with{'out' * (seq is not None)} seq="
            )
        if seq is not None:
            self._check_seq(seq)
        if wrong := [key for key, value in self._identity().items() if header.get(key) != value]:
            saved, here = ({key: d.get(key) for key in wrong} for d in (header, self._identity()))
            raise StateError(f"this state is not of this model: it was saved with {saved}, here it is {here}")
        with self._use() as c, collected_errors() as errors:
            source = ffi.from_buffer("uint8_t[]", data)
            if seq is None:
                self._clear()
                n = lib.llama_state_set_data(c, source, len(data))
            else:
                lib.llama_memory_seq_rm(self._memory, seq, -1, -1)
                n = lib.llama_state_seq_set_data(c, source, len(data), seq)
            self._n_outputs = 0
            self._pending = {s: token for s, token in self._pending.items() if s != seq}
            if n == 0:
                raise StateError(
                    f"the library refuses this state: {reason(errors, 'no reason given')}. n_ctx, n_seq_max, "
                    "kv_unified and the cache types must suit the context that it was saved from"
                )
            self._pending.update({saved if seq is None else seq: token for saved, token in header["pending"]})

    def state_save_file(self, path: str | os.PathLike[str], seq: int | None = None) -> None:
        """state_save() into a file, which is complete or as it was before. Raises: also OSError."""
        target = Path(path)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            part.write_bytes(self.state_save(seq))
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def state_load_file(self, path: str | os.PathLike[str], seq: int | None = None) -> None:
        """state_load() from a file. Raises: also OSError."""
        self.state_load(Path(path).read_bytes(), seq)

    def _identity(self) -> dict[str, Any]:
        model = self.model
        facts = {"n_params": model.n_params, "n_vocab": model.n_vocab, "n_layer": model.n_layer}
        return {"upstream": upstream_build(), "model": model.description, **facts}


def _range(begin: int, end: int | None) -> tuple[int, int]:
    """Checked, with the library's -1 for an open end."""
    if begin < 0 or (end is not None and end < begin) or max(begin, end or 0) >= 2**31:
        raise ContextError(f"[{begin}, {end}) is no range of positions")
    return begin, -1 if end is None else end


def _unpack(state: bytes) -> tuple[dict[str, Any], memoryview]:
    """The header and the data of a saved state. Raises: StateError if they are not whole."""
    view = memoryview(state)
    begin = len(MAGIC) + LENGTH.size
    if bytes(view[: len(MAGIC)]) != MAGIC or len(view) < begin:
        raise StateError("this is no state that Context.state_save() made")
    (n_header,) = LENGTH.unpack_from(view, len(MAGIC))
    try:
        header = json.loads(bytes(view[begin : begin + n_header]))
        data = view[begin + n_header :]
        whole = len(data) == header["bytes"] and zlib.crc32(data) == header["crc32"]
    except (ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        raise StateError(f"the state is damaged or cut off ({len(view)} bytes); save it again")
    return header, data
