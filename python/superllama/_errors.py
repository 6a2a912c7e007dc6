"""What can go wrong: one class for each thing that a caller may want to handle.

Each message says what happened, why, and what to try, with the numbers where there are some. Parameters of
a wrong type or out of range raise pydantic.ValidationError instead, before anything is loaded.
"""

from __future__ import annotations

import copyreg
from typing import Any


class Error(Exception):
    """Every error of superllama is one of these. All of them pickle, with their text and their attributes, so that
    they pass from a process pool to its caller as what they are."""

    def __reduce__(self) -> tuple[Any, ...]:
        # not by calling the class with `args`, as exceptions do: what a class asks for besides its text is no argument
        # of Exception, and the call would fail in the process that reads it
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class ModelError(Error):
    """A model or an adapter file cannot be loaded, or a model does not offer what was asked of it."""


class ContextError(Error):
    """A context cannot be made, or does not offer what was asked of it."""


class DecodeError(Error):
    """The library could not process a batch. The context stays usable unless the text says otherwise."""


class PreemptedError(DecodeError):
    """A request that was ended because the context has no room for it beside the others. It works when they are done:
    `LLM` tries again by itself, unless the text streams."""


class PausedError(Error):
    """An engine whose memory is given back was asked for something; it works again after resume()."""


class PromptError(Error, ValueError):
    """A prompt, a text or a list of tokens that cannot be processed: empty, not UTF-8, not of this vocabulary."""


class PromptTooLongError(PromptError):
    """A prompt with more tokens than there is room for.

    Attributes: `n_tokens` that were given, `n_room` that would have fitted.
    """

    def __init__(self, message: str, n_tokens: int, n_room: int) -> None:
        super().__init__(message)
        self.n_tokens = n_tokens
        self.n_room = n_room


class RequestError(Error, ValueError):
    """A request that an engine cannot serve as it is: a value out of range, a field that it does not know."""


class TemplateError(PromptError):
    """The model has no chat template, or the messages do not fit it."""


class GrammarError(Error, ValueError):
    """A form that cannot be held: a grammar that cannot be parsed, a schema or an expression that a grammar cannot
    hold, two forms at once. Also an answer that does not have its form, mostly for it was cut."""


class StateError(Error):
    """Saved state that is damaged, or was saved by another model or context."""


class ConcurrentUseError(Error, RuntimeError):
    """A context was used while another thread was using it. Make a context for each thread; they share the model."""


class ForkedError(Error, RuntimeError):
    """A model or a context was used in a process that was forked from the one which made it. The threads that work for
    it stayed behind: load the model in the process that uses it, or start processes with "spawn"."""


class CancelledError(Error):
    """Loading or decoding was stopped by a callback or by `Context.cancel()`."""


class DownloadError(Error):
    """A file could not be fetched, or is not the one that was expected."""
