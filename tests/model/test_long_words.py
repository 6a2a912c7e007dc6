"""Words of any length: upstream cuts text by a regular expression that recurses with every letter of a word."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import tiny_model as tiny
from running import Runner

# tokenizers that cut by std::regex, for want of code of their own, and one that does not
KINDS = ["gpt-4o", "deepseek-llm", "deepseek-coder", "deepseek-v3", "tekken", "gpt-2"]

WORDS = {
    "small": "a",
    "large": "A",
    "mixed": "aA",
    "digits": "7",
    "marks": "!",
    "spaces": " ",
    "lines": "\n",
    "other letters": "é",
    "han": "漢",
    "emoji": "😀",
}


def byte_letters() -> list[str]:
    """How byte-level vocabularies write each byte: printable ones as they are, the others from U+0100 on."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(256))
    return [chr(b) if b in plain else chr(256 + next(others)) for b in range(256)]


def write_byte_level(path: Path, kind: str) -> Path:
    """The tiny model with a vocabulary of bytes, none of which merge: a text has as many tokens as bytes."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(512)
    w.add_embedding_length(64)
    w.add_block_count(0)
    w.add_feed_forward_length(128)
    w.add_head_count(4)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre(kind)
    w.add_token_list(byte_letters())
    w.add_token_types([gguf.TokenType.NORMAL] * 256)
    w.add_token_merges(["a b"])
    w.add_add_bos_token(False)
    return tiny.finish(w, path)


SCRIPT = """
import sys, threading
from superllama._native import ffi, lib
params = lib.llama_model_default_params()
params.vocab_only = True
model = lib.llama_model_load_from_file(sys.argv[1].encode(), params)
assert model != ffi.NULL
vocab = lib.llama_model_get_vocab(model)
words = sys.argv[3].split("|")
def tokenize():
    for word in words:
        text = (word.encode("utf-8").decode("unicode_escape") * int(sys.argv[2])).encode("utf-8", "surrogatepass")
        tokens = ffi.new("llama_token[]", len(text) + 1)
        n = lib.llama_tokenize(vocab, text, len(text), tokens, len(text) + 1, False, False)
        assert n == len(text), (word, n, len(text))
thread = threading.Thread(target=tokenize)
tokenize(); thread.start(); thread.join(); print("done")
"""


@pytest.mark.parametrize("kind", KINDS)
def test_long_words(tmp_path: Path, run_python: Runner, kind: str) -> None:
    model = write_byte_level(tmp_path / "words.gguf", kind)
    words = "|".join(word.encode("unicode_escape").decode() for word in WORDS.values())
    done = run_python(SCRIPT, model, 30_000, words)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == "done\n"


TOO_LONG = """
import sys
from superllama._native import ffi, lib, last_error
params = lib.llama_model_default_params()
params.vocab_only = True
vocab = lib.llama_model_get_vocab(lib.llama_model_load_from_file(sys.argv[1].encode(), params))
text = b"a" * 3_000_000
tokens = ffi.new("llama_token[]", len(text))
print(lib.llama_tokenize(vocab, text, len(text), tokens, len(text), False, False), last_error())
words = b"a b\\n" * 100_000
print(lib.llama_tokenize(vocab, words, len(words), tokens, len(text), False, False))
"""


def test_a_word_that_is_too_long(tmp_path: Path, run_python: Runner) -> None:
    """It is an error, and length alone is none."""
    done = run_python(TOO_LONG, write_byte_level(tmp_path / "words.gguf", "gpt-4o"))
    assert done.returncode == 0, done.stderr[-2000:]
    refused, accepted = done.stdout.splitlines()
    assert refused.startswith(f"{-(2**31)} ")
    assert "3000000 bytes without a space" in refused
    assert accepted == "400000"
