"""A grammar as the library parses it, and the reason where it does not."""

from __future__ import annotations

import functools
from typing import Any

from ._errors import GrammarError
from ._native import ffi, last_error, lib
from ._text import utf8

NO_VOCABULARY = "no vocab to parse token"  # what is said of <TOKEN> where there is none


def grammar_sampler(text: str, vocabulary: Any) -> Any:
    """The native sampler of a grammar, whose rule `root` is the whole text. Raises: GrammarError with the reason."""
    sampler = lib.superllama_sampler_init_grammar(vocabulary, utf8(text, "the grammar"), b"root")
    if sampler == ffi.NULL:
        raise GrammarError(last_error())
    return sampler


@functools.lru_cache(256)
def check_grammar(text: str) -> None:
    """Raises: GrammarError for one that cannot be parsed, as far as that is to be seen without a vocabulary."""
    if lib.superllama_check_grammar(ffi.NULL, utf8(text, "the grammar"), b"root") != 0:
        why = last_error()
        if NO_VOCABULARY not in why:
            raise GrammarError(why)
