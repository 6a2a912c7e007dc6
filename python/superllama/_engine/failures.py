"""The errors of the HTTP API as exceptions of ours."""

from __future__ import annotations

from typing import Any

from .._errors import (
    CancelledError,
    DecodeError,
    Error,
    GrammarError,
    ModelError,
    PausedError,
    PreemptedError,
    PromptTooLongError,
    RequestError,
)
from .._words import in_python


def failure(error: dict[str, Any]) -> Error:
    """The exception for an answer's `error`."""
    message = in_python(str(error.get("message", error)))
    kind = error.get("type", "")
    if kind == "exceed_context_size_error" and "n_prompt_tokens" in error:
        return PromptTooLongError(message, int(error["n_prompt_tokens"]), int(error["n_ctx"]))
    if kind == "cancelled":
        return CancelledError(message)
    if kind == "not_supported_error":
        return ModelError(message)
    if "the grammar can go on" in message:  # found while it is used
        return GrammarError(message.removeprefix("got exception: "))
    if kind in ("invalid_request_error", "not_found_error", "exceed_context_size_error"):
        about_grammar = any(word in message for word in ("grammar", "json_schema", "schema"))
        return GrammarError(message) if about_grammar else RequestError(message)
    if kind == "unavailable_error" and "context is full" in message:
        return PreemptedError(message)
    if kind == "unavailable_error" and "/superllama/resume" in message:
        return PausedError("the engine takes no requests: its memory is given back; resume() takes it again")
    return DecodeError(message)
