"""logits_processor: functions of a caller that change the scores of all tokens before the samplers see them.

They run in the engine's thread, between two batches, with Python's lock and none of ours: other requests wait for
them, as they wait for sampling. What one of them raises ends its request, and is raised where that one is read.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .._errors import RequestError

Scores = npt.NDArray[np.float32]
LogitsProcessor = Callable[[npt.NDArray[np.int32], Scores], Scores]

# int32_t (tokens, n_tokens, scores, n_scores, user_data), see superllama_logits_callback
CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int32,
    ctypes.POINTER(ctypes.c_int32),
    ctypes.c_size_t,
    ctypes.POINTER(ctypes.c_float),
    ctypes.c_size_t,
    ctypes.c_void_p,
)

_thread = threading.local()


def processors_of(given: object) -> tuple[LogitsProcessor, ...]:
    """The functions, from one or a list of them. Raises: RequestError for what is none."""
    if given is None:
        return ()
    several: list[Any] = list(given) if isinstance(given, Sequence) else [given]
    for function in several:
        if not callable(function):
            raise RequestError(
                f"logits_processor is a function (input_ids, scores) -> scores, or a list of them, not {function!r:.60}"
            )
    return tuple(several)


def runs_here(engine: object) -> bool:
    """Whether this thread is that engine's, in the middle of a processor."""
    return getattr(_thread, "engine", None) is engine


class Processors:
    """The functions of one request as what the engine calls; `error` is what one of them has raised."""

    def __init__(self, functions: Sequence[LogitsProcessor], engine: object) -> None:
        self.functions = functions
        self.engine = engine
        self.error: BaseException | None = None
        self.callback = CALLBACK(self._call)

    def _call(self, tokens: Any, n_tokens: int, scores: Any, n_scores: int, _: Any) -> int:
        _thread.engine = self.engine
        try:
            ids = np.ctypeslib.as_array(tokens, (n_tokens,)).astype(np.int32) if n_tokens else np.empty(0, np.int32)
            native = np.ctypeslib.as_array(scores, (n_scores,))
            found = native.copy()  # what a function keeps stays as it is
            for function in self.functions:
                found = _checked(function, function(ids, found), n_scores)
            native[:] = found
            return 0
        except BaseException as e:
            self.error = e
            return 1
        finally:
            _thread.engine = None


def _checked(function: LogitsProcessor, found: Any, n_scores: int) -> Scores:
    """What a function returned, as scores. Raises: RequestError for what is none."""
    name = getattr(function, "__qualname__", type(function).__qualname__)
    if found is None:
        raise RequestError(f"logits_processor: {name} returned nothing; it has to return the scores")
    scores = np.asarray(found, np.float32)
    if scores.shape != (n_scores,):
        raise RequestError(f"logits_processor: {name} returned scores of shape {scores.shape}; it is ({n_scores},)")
    if np.isnan(scores).any() or np.isposinf(scores).any():
        raise RequestError(f"logits_processor: {name} returned scores that are no numbers, or +inf; -inf bans a token")
    if np.isneginf(scores).all():
        raise RequestError(f"logits_processor: {name} bans every token; one has to be left")
    return scores
