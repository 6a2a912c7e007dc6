"""Spans of OpenTelemetry for requests, with the names of its conventions for generative AI; needs the extra "otel".

A program that traces has imported the API: where none has, nothing is imported and nothing is measured.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from .. import __version__
from .results import ChatCompletion, Chunk, Completion, Usage

_OPERATIONS = {"/v1/chat/completions": "chat", "/embeddings": "embeddings"}
_OPERATIONS |= dict.fromkeys(("/completion", "/infill"), "text_completion")
# of a request's body, where it is there
_ASKED = {
    **{name: name for name in ("max_tokens", "temperature", "top_p", "top_k", "seed", "stream")},
    **{name: name for name in ("frequency_penalty", "presence_penalty")},
    **{"n_predict": "max_tokens", "n_cmpl": "choice.count", "n": "choice.count", "stop": "stop_sequences"},
}
_MODEL = "gen_ai.request.model"
_USED = {"input": "prompt_tokens", "cache_read.input": "cached_tokens", "output": "generated_tokens"}


def begun(path: str, body: Mapping[str, Any] | None, model: str) -> Span | None:
    """The span of a request that begins now; None for what is no inference, or where nobody traces."""
    operation, trace, given = _OPERATIONS.get(path), sys.modules.get("opentelemetry.trace"), body or {}
    if operation is None or trace is None:
        return None
    asked = {name: given[key] for key, name in _ASKED.items() if given.get(key) is not None}
    if asked.get("choice.count") == 1:
        del asked["choice.count"]
    attributes = {f"gen_ai.request.{name}": value for name, value in asked.items()}
    attributes |= {"gen_ai.operation.name": operation, "gen_ai.provider.name": "superllama", _MODEL: model}
    span = trace.get_tracer("superllama", __version__).start_span(
        f"{operation} {model}", kind=trace.SpanKind.INTERNAL, attributes=attributes
    )
    return Span(span, trace) if span.is_recording() else None


@contextlib.contextmanager
def ending(span: Span | None) -> Iterator[None]:
    """Ends it after the block, as that ended."""
    try:
        yield
    except BaseException as e:
        if span:
            span.failed(e)
        raise
    if span:
        span.answered()


class Span:
    """A span that is open until answered() or failed()."""

    def __init__(self, span: Any, trace: Any) -> None:
        self._span, self._trace = span, trace
        self._began = time.perf_counter()
        self._is_first = True
        self._ends: dict[int, tuple[str, Usage | None]] = {}  # of each text

    def chunk(self, chunk: Chunk) -> None:
        """A piece of an answer that streams."""
        if self._is_first and (chunk.text or chunk.tokens or chunk.reasoning or chunk.finish_reason):
            self._is_first = False
            self._span.set_attribute("gen_ai.response.time_to_first_chunk", time.perf_counter() - self._began)
        if chunk.finish_reason:
            self._ends[chunk.index] = chunk.finish_reason, chunk.usage

    def answered(self, result: object = None) -> None:
        """All of it is there; nothing more is known of a stream."""
        if isinstance(result, Completion | ChatCompletion):
            self._ends[0] = result.finish_reason, result.usage
            for i, other in enumerate(getattr(result, "alternatives", ()), 1):  # of a prompt that counts once
                self._ends[i] = other.finish_reason, Usage(0, 0, other.usage.generated_tokens)
        self._end()

    def failed(self, error: BaseException) -> None:
        """There is no answer, or not all of it."""
        if not isinstance(error, GeneratorExit):  # who reads a stream has enough
            self._span.set_attribute("error.type", type(error).__qualname__)
            self._span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, str(error)))
        self._end()

    def _end(self) -> None:
        ends = [self._ends[i] for i in sorted(self._ends)]
        if ends:
            self._span.set_attribute("gen_ai.response.finish_reasons", [reason for reason, _ in ends])
        if usage := [usage for _, usage in ends if usage]:
            for name, field in _USED.items():
                self._span.set_attribute(f"gen_ai.usage.{name}_tokens", sum(getattr(one, field) for one in usage))
        self._span.end()
