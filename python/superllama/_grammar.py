"""A grammar as the library parses it, and the reason where it does not: its parser only prints that."""

from __future__ import annotations

import functools
import re
from typing import Any

from ._errors import GrammarError
from ._native import collected_errors, ffi, lib, reason
from ._stderr import printed_to_stderr
from ._text import utf8

PARSE_ERROR = b"error parsing grammar: "
NO_VOCABULARY = "no vocab to parse token"  # what is said of <TOKEN> where there is none
MAX_REASON = 500  # characters: the parser quotes the rest of the grammar


def grammar_sampler(text: str, vocabulary: Any) -> Any:
    """The native sampler of a grammar, whose rule `root` is the whole text. Raises: GrammarError with the reason."""
    data = utf8(text, "the grammar")
    with collected_errors() as errors, printed_to_stderr(PARSE_ERROR) as printed:
        sampler = lib.superllama_sampler_init_grammar(vocabulary, data, b"root")
    if sampler == ffi.NULL:
        why = re.search(PARSE_ERROR + rb"(.*?)\n\n", printed.getvalue() + b"\n\n", re.DOTALL)
        told = why[1].decode("utf-8", "replace").strip() if why else reason(errors, "it cannot be parsed")
        raise GrammarError(
            f"the grammar cannot be used: {told[:MAX_REASON]}; see llama.cpp's grammars/README.md for GBNF"
        )
    return sampler


@functools.lru_cache(256)
def check_grammar(text: str) -> None:
    """Raises: GrammarError for one that cannot be parsed, as far as that is to be seen without a vocabulary."""
    try:
        lib.llama_sampler_free(grammar_sampler(text, ffi.NULL))
    except GrammarError as e:
        if NO_VOCABULARY not in str(e):
            raise
