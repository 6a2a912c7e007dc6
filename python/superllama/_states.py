"""Saved states: what a context or one of its sequences holds, as bytes or as a file, and back.

A state is the library's data behind a header, JSON and then spaces: what the state belongs to, what the library's data
does not hold, and a checksum of it all. A file is a session file of the library: two numbers that say what it is, and
a list of tokens, in whose place the header stands. So it is written and read by the library itself, part by part, and
needs no memory of its own size. State in memory begins with a text instead; either can be loaded.
"""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from typing import Any, BinaryIO

from ._errors import StateError
from ._files import open_regular, replaceable
from ._native import collected_errors, ffi, lib, reason, upstream_build
from ._sequences import Sequences

MAGIC = b"superllama-state-1\n"
LENGTH = struct.Struct("<I")
SESSION = struct.Struct("=III")  # magic, version, length of the header in units of four bytes
WHOLE = (lib.LLAMA_SESSION_MAGIC, lib.LLAMA_SESSION_VERSION)
ONE = (lib.LLAMA_STATE_SEQ_MAGIC, lib.LLAMA_STATE_SEQ_VERSION)
NO_SUM = b'"crc32": "00000000"'
MAX_HEADER_BYTES = 1 << 24
PART_BYTES = 1 << 20


class States(Sequences):
    """Saving and loading."""

    def state_save(self, seq: int | None = None) -> bytes:
        """What the context holds, or one sequence of it, as bytes: about as many as its part of the KV cache.

        A generation goes on after state_load() as it would have: generate(..., keep=True). Bit by bit, in models whose
        layers all look at everything before, and in recurrent ones. Where layers have sliding windows, or are of both
        kinds, the library lays the tokens out in another order, and sums over them may differ in their last bits; of
        one sequence only what the windows still see is saved, so seq_remove() can go back less far afterwards.
        """
        if seq is not None:
            self._check_seq(seq)
        with self._use() as c, collected_errors() as errors:
            lib.llama_synchronize(c)
            size = lib.llama_state_get_size(c) if seq is None else lib.llama_state_seq_get_size(c, seq)
            header = self._header(seq)
            begin = len(MAGIC) + LENGTH.size + len(header)
            # the library writes where the result is: a state may be most of the memory, and would not fit twice. Nobody
            # else has these bytes before they are returned
            state = bytes(begin + size)
            place = ffi.from_buffer("uint8_t[]", state)
            if seq is None:
                n = lib.llama_state_get_data(c, place + begin, size)
            else:
                n = lib.llama_state_seq_get_data(c, place + begin, size, seq)
            if n == 0:
                raise StateError(f"the state cannot be saved: {reason(errors, 'the library gives no reason')}")
        crc = zlib.crc32(memoryview(state)[begin : begin + n], zlib.crc32(header))
        start = MAGIC + LENGTH.pack(len(header)) + _summed(header, crc)
        ffi.memmove(place, start, begin)
        return state[: begin + n]  # the same object, unless the library wrote less than it had said

    def state_load(self, state: bytes, seq: int | None = None) -> None:
        """Hold again what state_save() saved. The state of one sequence can be loaded into any sequence.

        Raises: StateError if the state is damaged, or of another model; the context keeps what it held. If
        the library then refuses it (another cache type, a smaller context), what it held is removed.
        """
        try:
            view = memoryview(state).cast("B")
        except TypeError:
            raise StateError(
                f"a state is bytes, not {type(state).__name__}; state_load_file() takes the path of one"
            ) from None
        header, begin = self._checked(io.BytesIO(view[: len(MAGIC) + LENGTH.size + MAX_HEADER_BYTES]), seq, view)
        data = view[begin:]
        with self._use() as c, collected_errors() as errors:
            source = ffi.from_buffer("uint8_t[]", data)
            self._make_room(seq)
            if seq is None:
                n = lib.llama_state_set_data(c, source, len(data))
            else:
                n = lib.llama_state_seq_set_data(c, source, len(data), seq)
            self._loaded(n, header, seq, errors)

    def state_save_file(self, path: str | os.PathLike[str], seq: int | None = None) -> None:
        """state_save() into a file, which is complete or as it was before. Needs no memory of the state's size.

        Raises: also OSError.
        """
        if seq is not None:
            self._check_seq(seq)
        target = replaceable(path, StateError)
        part = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            with self._use() as c, collected_errors() as errors:
                header = self._header(seq)
                words = ffi.from_buffer("llama_token[]", header)
                name, n = os.fsencode(part), len(header) // 4
                if seq is None:
                    done = lib.llama_state_save_file(c, name, words, n)
                else:
                    done = lib.llama_state_seq_save_file(c, name, seq, words, n)
                if not done:
                    with part.open("ab"):  # a folder that cannot be written says so better than the library
                        pass
                    raise StateError(f"the state cannot be saved: {reason(errors, 'the library gives no reason')}")
            with part.open("r+b") as file:
                file.seek(SESSION.size + len(header))
                crc = _crc(file, zlib.crc32(header))
                file.seek(SESSION.size)
                file.write(_summed(header, crc))
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    def state_load_file(self, path: str | os.PathLike[str], seq: int | None = None) -> None:
        """state_load() from a file, which is read part by part. Raises: also OSError."""
        with open_regular(path, StateError) as file:
            if file.read(len(MAGIC)) == MAGIC:  # what state_save() returned, written by the caller
                file.seek(0)
                self.state_load(file.read(), seq)
                return
            file.seek(0)
            header, begin = self._checked(file, seq)
        n_words = (begin - SESSION.size) // 4
        with self._use() as c, collected_errors() as errors:
            words, n_read = ffi.new("llama_token[]", n_words), ffi.new("size_t *")
            self._make_room(seq)
            if seq is None:
                n = lib.llama_state_load_file(c, os.fsencode(path), words, n_words, n_read)
            else:
                n = lib.llama_state_seq_load_file(c, os.fsencode(path), seq, words, n_words, n_read)
            self._loaded(n, header, seq, errors)

    # ---------------------------------------------------------------- parts

    def _header(self, seq: int | None) -> bytes:
        """With the place for the checksum; a multiple of four bytes."""
        seqs = range(self.n_seq_max) if seq is None else [seq]
        facts = {
            **self._identity(),
            "seq": seq,
            "pending": [[s, self._pending[s]] for s in seqs if s in self._pending],
            "first": [[s, self._first[s]] for s in seqs if self._first.get(s)],
        }
        text = json.dumps(facts).encode()[:-1] + b", " + NO_SUM + b"}"
        return text + b" " * (-len(text) % 4)

    def _checked(self, file: BinaryIO, seq: int | None, view: memoryview | None = None) -> tuple[dict[str, Any], int]:
        """The header of a state, and where the library's data begins; the data is in `view`, or follows in the file.

        Raises: StateError if it is damaged, or not a state that can be loaded as this.
        """
        whole, n_header = _start_of(file)
        begin = file.tell() + n_header
        raw = file.read(n_header) if n_header <= MAX_HEADER_BYTES else b""
        head, _, tail = raw.rpartition(NO_SUM[:-9])  # what follows is the sum, and its quote
        header = _parsed(raw)
        crc = zlib.crc32(head + NO_SUM + tail[9:])
        crc = _crc(file, crc) if view is None else zlib.crc32(view[begin:], crc)
        if header is None or header["crc32"] != f"{crc:08x}" or whole not in (None, header["seq"] is None):
            raise StateError("the state is damaged or cut off; save it again")
        if (header["seq"] is None) != (seq is None):
            kind = "the whole context" if header["seq"] is None else "one sequence"
            raise StateError(f"this is the state of {kind}; load it with{'out' * (seq is not None)} seq=")
        if seq is not None:
            self._check_seq(seq)
        identity = self._identity()
        if wrong := [key for key in identity if header.get(key) != identity[key]]:
            saved, here = ({key: d.get(key) for key in wrong} for d in (header, identity))
            raise StateError(f"this state is not of this model: it was saved with {saved}, here it is {here}")
        for s, token in header["pending"]:
            if not 0 <= token < self.model.n_vocab or (seq is None and not 0 <= s < self.n_seq_max):
                raise StateError(f"this state has token {token} in sequence {s}, which this context cannot hold")
        return header, begin

    def _make_room(self, seq: int | None) -> None:
        if seq is None:
            self._clear()
        else:
            self._forget(seq)
        self._n_outputs = 0

    def _loaded(self, done: int, header: dict[str, Any], seq: int | None, errors: Any) -> None:
        if not done:
            self._make_room(seq)  # a part of it may have been taken
            raise StateError(
                f"the library refuses this state: {reason(errors, 'no reason given')}. n_ctx, n_seq_max, "
                "kv_unified and the cache types must suit the context that it was saved from"
            )
        self._check_positions(seq)
        self._pending.update({s if seq is None else seq: token for s, token in header["pending"]})
        self._first.update({s if seq is None else seq: first for s, first in header["first"]})

    def _check_positions(self, seq: int | None) -> None:
        """Raises: StateError where no text of this context can end. Some graphs take memory by the largest position."""
        most = max(self._n_ctx, self.model.n_ctx_train)
        if not self._memory or lib.llama_model_is_recurrent(self.model._c):
            return
        for s in range(lib.llama_n_seq_max(self._c)) if seq is None else [seq]:
            if (end := int(lib.llama_memory_seq_pos_max(self._memory, s))) >= most:
                self._make_room(seq)
                raise StateError(f"the state is damaged: sequence {s} ends at position {end}, the context has {most}")

    def _identity(self) -> dict[str, Any]:
        model = self.model
        facts = {"n_params": model.n_params, "n_vocab": model.n_vocab, "n_layer": model.n_layer}
        return {"upstream": upstream_build(), "model": model.description, **facts}


def _start_of(file: BinaryIO) -> tuple[bool | None, int]:
    """Whether a state is of a whole context, where that is said before the header, and the header's length.

    Raises: StateError.
    """
    start = file.read(SESSION.size)
    if MAGIC.startswith(start) and start:
        rest = file.read(len(MAGIC) + LENGTH.size - len(start))
        if (start + rest).startswith(MAGIC) and len(start + rest) == len(MAGIC) + LENGTH.size:
            return None, LENGTH.unpack((start + rest)[len(MAGIC) :])[0]
    elif len(start) == SESSION.size and (kind := SESSION.unpack(start))[:2] in (WHOLE, ONE):
        return kind[:2] == WHOLE, 4 * kind[2]
    raise StateError("this is no state that this version's Context.state_save() made")


def _summed(header: bytes, crc: int) -> bytes:
    """The header with its checksum, which was taken with zeros in its place."""
    head, _, tail = header.rpartition(NO_SUM)
    return head + NO_SUM[:-9] + b'%08x"' % crc + tail


def _crc(file: BinaryIO, crc: int) -> int:
    while part := file.read(PART_BYTES):
        crc = zlib.crc32(part, crc)
    return crc


def _parsed(raw: bytes) -> dict[str, Any] | None:
    """The header, if all of its fields are there and are what they should be."""
    try:
        header = json.loads(raw)
        pairs = [*header["pending"], *header["first"]]
        whole = isinstance(header["crc32"], str) and (header["seq"] is None or isinstance(header["seq"], int))
        if whole and all(isinstance(n, int) for s, value in pairs for n in (s, value)):
            return dict(header)
    except (ValueError, KeyError, TypeError, RecursionError):  # the last one is how json refuses what is nested deeply
        pass
    return None
