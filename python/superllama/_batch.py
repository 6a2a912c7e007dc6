"""A llama_batch for tokens of one sequence, allocated once and filled again for each call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ._native import ffi

Outputs = Literal["last", "all"] | Literal[False]


class Batch:
    """Room for `n_max` tokens."""

    def __init__(self, n_max: int) -> None:
        self.n_max = n_max
        self._token = ffi.new("llama_token[]", n_max)
        self._pos = ffi.new("llama_pos[]", n_max)
        self._n_seq_id = ffi.new("int32_t[]", [1] * n_max)
        self._seq = ffi.new("llama_seq_id *")  # every token points to it
        self._seq_id = ffi.new("llama_seq_id *[]", [self._seq] * n_max)
        self._logits = ffi.new("int8_t[]", n_max)
        self.c: Any = ffi.new("llama_batch *")
        self.c.token, self.c.pos, self.c.logits = self._token, self._pos, self._logits
        self.c.n_seq_id, self.c.seq_id = self._n_seq_id, self._seq_id

    def fill(self, tokens: Sequence[int], seq: int, pos: int, outputs: Outputs) -> Any:
        """The llama_batch by value: `tokens` of sequence `seq` from position `pos` on."""
        n = len(tokens)
        self.c.n_tokens = n
        self._token[0:n] = tokens
        self._pos[0:n] = range(pos, pos + n)
        self._seq[0] = seq
        self._logits[0:n] = bytes([outputs == "all"]) * n
        if outputs:
            self._logits[n - 1] = 1
        return self.c[0]
