"""Text to tokens, tokens to text, conversations to prompts. Nothing here depends on a context."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, TypeGuard

from ._chat_template import checked, joined
from ._errors import PromptError, TemplateError
from ._native import ffi, lib

MAX_TEXT_BYTES = 2**31 - 1


def is_text(value: object) -> TypeGuard[str | bytes]:
    """Whether this is text: str, or UTF-8 in bytes of some kind. A list of numbers is not, it may be tokens."""
    return isinstance(value, str | bytes | bytearray | memoryview)


def is_token(value: object) -> bool:
    """Whether this may be a token: a whole number, of numpy's too."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def utf8(text: str | bytes, what: str = "the text") -> bytes:
    """The text as UTF-8. Raises: PromptError if it is not, or is longer than the library takes."""
    if not is_text(text):
        hint = "; a list of numbers may be tokens already" if _is_iterable(text) else ""
        raise PromptError(f"{what} must be str or UTF-8 in bytes, not {type(text).__name__}{hint}")
    try:
        data = text.encode() if isinstance(text, str) else bytes(text)
        data.decode()
    except UnicodeError as e:
        position = getattr(e, "start", 0)
        raise PromptError(
            f"{what} is not UTF-8: {e.reason if isinstance(e, UnicodeDecodeError | UnicodeEncodeError) else e} "
            f"at position {position}; decode it with errors='replace' first"
        ) from e
    if len(data) > MAX_TEXT_BYTES:
        raise PromptError(f"{what} has {len(data)} bytes; the library takes {MAX_TEXT_BYTES}")
    return data


def token_list(tokens: object, hint: str = "give a list of tokens, as tokenize() returns it") -> list[int]:
    """The tokens as a list of int. Raises: PromptError if they are something else, with the hint."""
    if is_text(tokens) or isinstance(tokens, Mapping) or not _is_iterable(tokens):
        raise PromptError(f"{type(tokens).__name__} where tokens are expected: {hint}")
    found = []
    for i, token in enumerate(tokens):
        if not is_token(token):
            raise PromptError(f"{token!r:.40} at position {i} is no token: {hint}")
        found.append(int(token))
    return found


def _is_iterable(value: object) -> TypeGuard[Iterable[Any]]:
    try:
        iter(value)  # type: ignore[call-overload]
    except TypeError:  # also of numpy's arrays without a dimension
        return False
    return True


def tokenize(vocab: Any, data: bytes, add_special: bool, parse_special: bool) -> list[int]:
    """llama_tokenize() with a buffer that is large enough. `data` is what utf8() returned."""
    if lib.llama_vocab_type(vocab) == lib.LLAMA_VOCAB_TYPE_NONE:
        raise PromptError("this model has no vocabulary; give it tokens instead of text")
    n_max = len(data) // 2 + 16
    while True:
        tokens = ffi.new("llama_token[]", n_max)
        n = lib.llama_tokenize(vocab, data, len(data), tokens, n_max, add_special, parse_special)
        if n >= 0:
            return list(tokens[0:n])
        if n == -(2**31):
            raise PromptError(f"a text of {len(data)} bytes is more tokens than the library can count")
        n_max = -n


def check_tokens(tokens: Sequence[int], n_vocab: int) -> None:
    """Raises: PromptError for a token that is not in the vocabulary; the library would abort."""
    for i, token in enumerate(tokens):
        if not 0 <= token < n_vocab:
            raise PromptError(f"token {token} at position {i} is not in the vocabulary (0 to {n_vocab - 1})")


def detokenize(vocab: Any, tokens: Sequence[int], n_vocab: int, special: bool) -> bytes:
    """llama_detokenize() with a buffer that is large enough."""
    tokens = token_list(tokens)
    check_tokens(tokens, n_vocab)
    ids = ffi.new("llama_token[]", tokens)
    size = 8 * len(tokens) + 16
    while True:
        buffer = ffi.new("char[]", size)
        n = lib.llama_detokenize(vocab, ids, len(tokens), buffer, size, False, special)
        if n >= 0:
            return bytes(ffi.buffer(buffer, n))
        size = -n


def token_bytes(vocab: Any, token: int, n_vocab: int, special: bool) -> bytes:
    """llama_token_to_piece() with a buffer that is large enough."""
    check_tokens(token_list([token]), n_vocab)
    size = 32
    while True:
        buffer = ffi.new("char[]", size)
        n = lib.llama_token_to_piece(vocab, token, buffer, size, 0, special)
        if n >= 0:
            return bytes(ffi.buffer(buffer, n))
        size = -n


def apply_template(template: str, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
    """llama_chat_apply_template(): the prompt for a conversation by a template that the library knows by name."""
    owned, prepared = [], checked(messages)
    c_messages = ffi.new("llama_chat_message[]", len(prepared))
    for i, (c, message) in enumerate(zip(c_messages, prepared, strict=True)):
        role, content = (utf8(joined(message[key]), f"the {key} of message {i}") for key in ("role", "content"))
        if b"\0" in role + content:
            raise TemplateError(f"message {i} contains a NUL character")
        owned += [ffi.new("char[]", role), ffi.new("char[]", content)]
        c.role, c.content = owned[-2:]

    name = ffi.new("char[]", utf8(template, "the template"))
    n = lib.llama_chat_apply_template(name, c_messages, len(prepared), add_generation_prompt, ffi.NULL, 0)
    if n < 0:
        shown = re.sub(r"\s+", " ", template)[:60]
        raise TemplateError(f"the library knows no chat template {shown!r}; name another one, e.g. template='chatml'")
    buffer = ffi.new("char[]", n + 1)
    lib.llama_chat_apply_template(name, c_messages, len(prepared), add_generation_prompt, buffer, n + 1)
    return bytes(ffi.buffer(buffer, n)).decode("utf-8", "replace")
