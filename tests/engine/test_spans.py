"""Spans of requests: what OpenTelemetry's conventions ask for, errors included; and nothing where nobody traces."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import superllama

trace = pytest.importorskip("opentelemetry.trace")
sdk = pytest.importorskip("opentelemetry.sdk.trace")
export = pytest.importorskip("opentelemetry.sdk.trace.export")
memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter")


@pytest.fixture(scope="module")
def exporter() -> Any:
    """A process has one provider, for good."""
    found = memory.InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(found))
    trace.set_tracer_provider(provider)
    return found


@pytest.fixture
def spans(exporter: Any) -> Iterator[Any]:
    exporter.clear()
    yield exporter.get_finished_spans
    exporter.clear()


def attributes(span: Any) -> Mapping[str, Any]:
    return {name.removeprefix("gen_ai."): value for name, value in span.attributes.items()}


def test_a_completion(llm: superllama.LLM, spans: Any) -> None:
    with trace.get_tracer("test").start_as_current_span("outer") as outer:
        found = llm.generate("the one", max_tokens=5, temperature=0, seed=3, stop=["\x00"], ignore_eos=True)
    span, parent = spans()
    name = Path(llm.model).name
    assert (span.name, span.kind) == (f"text_completion {name}", trace.SpanKind.INTERNAL)
    assert span.parent.span_id == outer.get_span_context().span_id and parent.name == "outer"
    assert span.instrumentation_scope.name == "superllama"
    assert span.end_time > span.start_time
    assert attributes(span) == {
        "operation.name": "text_completion",
        "provider.name": "superllama",
        "request.model": name,
        "request.max_tokens": 5,
        "request.temperature": 0,
        "request.seed": 3,
        "request.stop_sequences": ("\x00",),
        "response.finish_reasons": ("length",),
        "usage.input_tokens": found.usage.prompt_tokens,
        "usage.cache_read.input_tokens": found.usage.cached_tokens,
        "usage.output_tokens": 5,
    }
    assert span.status.is_unset


def test_several_texts(wide_llm: superllama.LLM, spans: Any) -> None:
    found = wide_llm.generate("the one", n=3, max_tokens=2, ignore_eos=True)
    wide_llm.generate(["a", "b"], max_tokens=1)
    first, *others = map(attributes, spans())
    assert first["request.choice.count"] == 3 and first["response.finish_reasons"] == ("length",) * 3
    assert first["usage.input_tokens"] == found.usage.prompt_tokens and first["usage.output_tokens"] == 6
    assert [span["usage.output_tokens"] for span in others] == [1, 1]


def test_streams(llm: superllama.LLM, spans: Any) -> None:
    begin = time.perf_counter()
    chunks = list(llm.chat_stream("Hello", max_tokens=4, ignore_eos=True))
    whole = time.perf_counter() - begin
    for _ in llm.stream("the", max_tokens=50):
        break
    chat, cut = spans()
    found = attributes(chat)
    assert found["operation.name"] == "chat" and found["request.stream"] is True
    assert 0 < found["response.time_to_first_chunk"] < whole
    assert found["response.finish_reasons"] == ("length",)
    assert found["usage.output_tokens"] == chunks[-1].usage.generated_tokens == 4
    # who reads no more has enough: no error, and no end of the text
    assert cut.status.is_unset and "error.type" not in cut.attributes
    assert "response.finish_reasons" not in attributes(cut)


def test_errors(llm: superllama.LLM, spans: Any) -> None:
    with pytest.raises(superllama.PromptTooLongError):
        llm.generate(list(range(5, 105)) * 50)
    with pytest.raises(superllama.PromptTooLongError):
        list(llm.stream(list(range(5, 105)) * 50))
    with pytest.raises(superllama.RequestError):
        llm.stream("a", slot=99)
    for span, error in zip(spans(), ["PromptTooLongError", "PromptTooLongError", "RequestError"], strict=True):
        assert span.attributes["error.type"] == error
        assert span.status.status_code is trace.StatusCode.ERROR and span.status.description


def test_asyncio(tiny_model: Path, spans: Any) -> None:
    async def work() -> None:
        llm = await superllama.AsyncLLM.load(tiny_model, n_ctx=512, n_parallel=1, chat_template="chatml")
        async with llm:
            await llm.generate("the", max_tokens=2, ignore_eos=True)
            assert [chunk async for chunk in llm.stream("the", max_tokens=2, ignore_eos=True)]
            task = asyncio.ensure_future(llm.chat("Hello", max_tokens=400, ignore_eos=True))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(work())
    whole, stream, cancelled = map(attributes, spans())
    assert whole["usage.output_tokens"] == stream["usage.output_tokens"] == 2
    assert stream["response.time_to_first_chunk"] > 0
    assert cancelled["operation.name"] == "chat" and cancelled["error.type"] == "CancelledError"


def test_vectors_and_what_is_no_inference(tiny_model: Path, spans: Any) -> None:
    with superllama.LLM(tiny_model, n_ctx=256, embedding=True, pooling="mean") as llm:
        llm.embed("the")
        llm.tokenize("the")
    (span,) = spans()
    assert attributes(span)["operation.name"] == "embeddings"


def test_nothing_is_imported_where_nobody_traces(tiny_model: Path) -> None:
    code = (
        "import sys, superllama\n"
        f"with superllama.LLM({str(tiny_model)!r}, n_ctx=256, progress=False) as llm: llm.generate('a', max_tokens=1)\n"
        "assert not [name for name in sys.modules if name.startswith('opentelemetry')]\n"
        # imported and not configured
        "import opentelemetry.trace\n"
        "from superllama._engine import spans\n"
        "assert spans.begun('/completion', {}, 'm') is None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
