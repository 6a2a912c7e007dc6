"""The errors of the HTTP API as exceptions of ours."""

from __future__ import annotations

import re
from typing import Any

from .._errors import (
    CancelledError,
    DecodeError,
    Error,
    GrammarError,
    ModelError,
    PausedError,
    PreemptedError,
    PromptError,
    PromptTooLongError,
    RequestError,
)
from .._words import in_python
from .fields import SYNONYMS

_NOT_FETCHED = "an image or a sound could not be fetched (10 MB and 10 seconds at most); give a file, or its bytes"
# what the library says of images and sounds, and what it means
_OF_MEDIA: dict[str, tuple[type[Error], str]] = {
    "Failed to load image or audio file": (
        PromptError,
        "an image or a sound cannot be read: its file is damaged, or of a variant that the library does not know",
    ),
    "cannot make GET request": (PromptError, _NOT_FETCHED),
    "Failed to download image": (PromptError, _NOT_FETCHED),
    "HTTPS is not supported": (
        PromptError,
        "this build has no HTTPS to fetch an image or a sound with; give a file or bytes",
    ),
    "failed to process mtmd chunk": (
        DecodeError,
        "an image or a sound could not be computed: the context has no room for it beside the other requests, or there "
        "is no memory for it; ask again when they are done, or make n_ctx larger",
    ),
}


_NOT_SWITCHED_ON = re.compile(r"This server does not support (.+)\. Start it with `--([\w-]+)`")
_OPTIONS = {"embeddings": "embedding=True", "slot-save-path": "slot_save_path=FOLDER"}  # others are switches
_TOO_LARGE_AT_ONCE = re.compile(r"input \((\d+) tokens\) is too large to process.*batch size: (\d+)\)")
# what stands before a reason, of whoever passed it on
_PASSED_ON = re.compile(
    r"(Unable to generate parser for this template\. Automatic parser generation failed: |Field 'json_schema': |"
    r"\"json_schema\": |JSON schema conversion failed:\s+|Failed to initialize samplers: |got exception: )+"
)
_FIELD = re.compile(r"Field '(\w+)': ")


def failure(error: dict[str, Any]) -> Error:
    """The exception for an answer's `error`."""
    said = str(error.get("message", error))
    kind = error.get("type", "")
    if kind == "exceed_context_size_error" and "n_prompt_tokens" in error:
        return _too_long(int(error["n_prompt_tokens"]), int(error["n_ctx"]))
    if found := _TOO_LARGE_AT_ONCE.search(said):
        return _too_large_at_once(int(found[1]), int(found[2]))
    if found := _NOT_SWITCHED_ON.search(said):
        option = _OPTIONS.get(found[2], found[2].replace("-", "_") + "=True")
        return ModelError(f"this engine was made without {found[1]}; make it with LLM(..., {option})")
    message = _FIELD.sub(lambda field: f"{SYNONYMS.get(field[1], field[1])}: ", _PASSED_ON.sub("", in_python(said)))
    for words, (error_type, meaning) in _OF_MEDIA.items():
        if words in message:
            return error_type(meaning)
    if kind == "cancelled":
        return CancelledError(message)
    if kind == "not_supported_error":
        return ModelError(message)
    if "the grammar can go on" in message:  # found while it is used
        return GrammarError(message)
    if "does not match the expected" in message:  # a parser of chat answers, which wants all of it
        return GrammarError(f"{message}; perhaps it was cut (max_tokens)")
    if kind in ("invalid_request_error", "not_found_error", "exceed_context_size_error"):
        about_grammar = any(word in said for word in ("grammar", "schema"))
        return GrammarError(message) if about_grammar else RequestError(message)
    if kind == "unavailable_error" and "context is full" in message:
        return PreemptedError(message)
    if kind == "unavailable_error" and "/superllama/resume" in message:
        return PausedError("the engine takes no requests: its memory is given back; resume() takes it again")
    return DecodeError(message)


def _too_long(n_tokens: int, n_ctx: int) -> PromptTooLongError:
    return PromptTooLongError(
        f"the prompt has {n_tokens} tokens, but the context has {n_ctx}; shorten it, or make the engine with "
        f"n_ctx={n_tokens + 1} or more",
        n_tokens,
        n_ctx,
    )


def _too_large_at_once(n_tokens: int, n_ubatch: int) -> PromptTooLongError:
    return PromptTooLongError(
        f"the text has {n_tokens} tokens, which are computed at once, and n_ubatch is {n_ubatch}; shorten it, or make "
        f"the engine with n_ubatch={n_tokens} and n_batch={n_tokens} or more",
        n_tokens,
        n_ubatch,
    )
