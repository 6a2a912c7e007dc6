"""What packages for llama-cpp-python look up of a vocabulary, beside Llama's own methods: Outlines reads all of it."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

from .._facts import ModelFacts


class _Tokens(Protocol):
    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]: ...

    def detokenize(
        self, tokens: Sequence[int], prev_tokens: Sequence[int] | None = None, special: bool = False
    ) -> bytes: ...


class LlamaTokenizer:
    """The tokens of a Llama, and of texts."""

    def __init__(self, llama: _Tokens) -> None:
        self._llama = llama
        self.tokenize, self.detokenize = llama.tokenize, llama.detokenize

    def encode(self, text: str, add_bos: bool = True, special: bool = True) -> list[int]:
        """The tokens of a text."""
        return self.tokenize(text.encode("utf-8", "ignore"), add_bos, special)

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""
        return self.detokenize(tokens).decode("utf-8", "ignore")


def llama_model_get_vocab(model: ModelFacts) -> ModelFacts:
    """What llama_token_to_piece() takes of Llama.model."""
    return model


def llama_token_to_piece(vocab: ModelFacts, token: int, buf: Any, length: int, lstrip: int, special: bool) -> int:
    """Writes what a token adds to a text into a buffer of ctypes, without its first `lstrip` spaces; `special`: control
    tokens too. How many bytes these are; where `length` is less, that number below 0, and nothing is written."""
    piece = vocab.token_bytes(token, special=bool(special))
    while lstrip > 0 and piece.startswith(b" "):
        piece, lstrip = piece[1:], lstrip - 1
    if len(piece) > length:
        return -len(piece)
    ctypes.memmove(buf, piece, len(piece))
    return len(piece)
