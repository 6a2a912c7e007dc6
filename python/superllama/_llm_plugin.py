"""A plugin of `llm`, the command line tool: models of this machine, by the names of `superllama list`.

    llm -m superllama-demo "What is a llama?"
    llm chat -m ollama:llama3.2:3b -o mem_budget 4GiB

An engine stays loaded for each model that was asked, so that a conversation goes on from what was computed. Options
that are an engine's own, such as mem_budget, load it anew when they change.
"""

# `llm` may be absent where types are checked, and everything of it is Any there
# mypy: allow-subclassing-any, allow-untyped-decorators

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import llm
from llm.parts import ReasoningPart, StreamEvent, TextPart, ToolCallPart, ToolResultPart
from pydantic import Field

from ._demo import demo_model
from ._models import found_models

if TYPE_CHECKING:
    from ._engine.base import Base
    from ._engine.llm import LLM
    from ._engine.results import ChatCompletion, Chunk

E = TypeVar("E", bound="Base")

DEMO = "superllama-demo"
HEAD_BYTES = 1 << 16  # of a file: its keys come before its vocabulary
# the key of models that were made for one vector a text: mean, cls and last are such, none and rank are not
POOLING = re.compile(rb"\.pooling_type\x04\0\0\0[\x01-\x03]\0\0\0")


@llm.hookimpl
def register_models(register: Callable[..., None]) -> None:
    """Models that answer: the small one, and all that are here."""
    for name in [DEMO, *(found.name for found in found_models())]:
        register(Superllama(name), AsyncSuperllama(name))


@llm.hookimpl
def register_embedding_models(register: Callable[..., None]) -> None:
    """Models whose files say that they were made for vectors."""
    for found in found_models():
        if _makes_vectors(found.path):
            register(SuperllamaEmbeddings(found.name))


def _makes_vectors(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return POOLING.search(file.read(HEAD_BYTES)) is not None
    except OSError:  # of another user
        return False


# ---------------------------------------------------------------- options, and the engines that are made with them


class EngineOptions(llm.Options):
    """How an engine is made; names and meanings are those of superllama.LLM."""

    mem_budget: int | str | None = Field(None, description="Memory of the host: 8GiB, 60%, auto")
    vram_budget: int | str | None = Field(None, description="Memory of each device: 6GiB, 0, auto")
    dynamic_layers: bool | None = Field(None, description="Layers in memory or on disk, whatever the model's size")
    async_prefetch: bool | None = Field(None, description="Read ahead what streams from disk")
    n_ctx: int | None = Field(None, description="Tokens of context (8192); 0 = as many as the model was made for")
    n_threads: int | None = Field(None, description="Threads that compute")
    n_gpu_layers: int | None = Field(None, description="The most layers that go to devices")
    chat_template: str | None = Field(None, description="A template by its name in llama.cpp, or one in Jinja")
    chat_template_file: str | None = Field(None, description="A file with one")


class Options(EngineOptions):
    """The same, and how an answer is made."""

    max_tokens: int | None = Field(None, description="The most tokens of an answer")
    temperature: float | None = Field(None, description="0 = always the most likely token")
    top_p: float | None = Field(None, description="Tokens that have this much of the probability together")
    top_k: int | None = Field(None, description="So many of the most likely tokens")
    min_p: float | None = Field(None, description="Tokens with this share of the most likely one's probability")
    repeat_penalty: float | None = Field(None, description="Against repetition; 1 = none")
    seed: int | None = Field(None, description="Same seed, same answer")
    stop: str | list[str] | None = Field(None, description="A text that ends the answer")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Variables of the chat template")


_engines: dict[tuple[Callable[..., Any], str], tuple[Mapping[str, Any], Base]] = {}
_loading = threading.Lock()


def _engine(make: Callable[..., E], name: str, options: Mapping[str, Any]) -> E:
    """The engine of a model that `make` makes: the one that is there, if it was made with these options."""
    wanted = {key: options[key] for key in EngineOptions.model_fields if options[key] is not None}
    with _loading:
        made_with, engine = _engines.get((make, name), ({}, None))
        if engine is None or engine.closed or made_with != wanted:
            if engine is not None:
                engine.close()  # first: the new one needs its memory
            engine = make(demo_model() if name == DEMO else name, **wanted)
            _engines[make, name] = wanted, engine
        return engine  # type: ignore[return-value] # what `make` makes


def _embedder(name: str, **options: Any) -> LLM:
    from ._engine.llm import LLM

    return LLM(name, embedding=True, **options)


# ---------------------------------------------------------------- models


class _Answers:
    """What both kinds of models that answer have in common."""

    model_id: str
    can_stream = True
    supports_schema = True
    supports_tools = True
    Options = Options

    def __init__(self, name: str) -> None:
        self.model_id = name

    def _asked(self, make: Callable[..., E], prompt: Any) -> tuple[E, list[dict[str, Any]], dict[str, Any]]:
        """An engine, and what it is asked."""
        options = prompt.options.model_dump()
        return _engine(make, self.model_id, options), _messages(prompt), _request(prompt, options)


class Superllama(_Answers, llm.Model):
    """A model that answers."""

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[Any]:
        """The pieces of an answer."""
        from ._engine.llm import LLM

        engine, messages, request = self._asked(LLM, prompt)
        answer = engine.chat_stream(messages, **request) if stream else [engine.chat(messages, **request)]
        for part in answer:
            yield from _events(part, response)


class AsyncSuperllama(_Answers, llm.AsyncModel):
    """The same for asyncio, with an engine of its own."""

    async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> AsyncIterator[Any]:
        """The pieces of an answer."""
        from ._engine.async_llm import AsyncLLM

        engine, messages, request = await asyncio.to_thread(self._asked, AsyncLLM, prompt)
        if stream:
            async for chunk in engine.chat_stream(messages, **request):
                for event in _events(chunk, response):
                    yield event
        else:
            for event in _events(await engine.chat(messages, **request), response):
                yield event


class SuperllamaEmbeddings(llm.EmbeddingModel):
    """A model that makes vectors."""

    batch_size = 64

    def __init__(self, name: str) -> None:
        self.model_id = name

    def embed_batch(self, items: Iterable[str], *, key: str | None = None) -> Iterator[list[float]]:
        """A vector for each text."""
        engine = _engine(_embedder, self.model_id, EngineOptions().model_dump())
        yield from engine.embed(list(items))


# ---------------------------------------------------------------- a prompt as a request, an answer as events


def _request(prompt: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """What chat() takes beside the messages."""
    request = {key: value for key, value in options.items() if key not in EngineOptions.model_fields}
    tools = [
        {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema}
        for tool in prompt.tools
    ]
    return request | {"response_format": prompt.schema, "tools": tools}


def _messages(prompt: Any) -> list[dict[str, Any]]:
    """The whole conversation as chat() takes it: there, each result of a tool is a message of its own."""
    messages: list[dict[str, Any]] = []
    for message in prompt.messages:
        results = [_result(part) for part in message.parts if isinstance(part, ToolResultPart)]
        messages += results or [_message(message)]
    return messages


def _result(part: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": part.tool_call_id, "name": part.name, "content": part.output}


def _message(message: Any) -> dict[str, Any]:
    text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
    thoughts = "".join(part.text for part in message.parts if isinstance(part, ReasoningPart))
    calls = [_call(part) for part in message.parts if isinstance(part, ToolCallPart)]
    found = {"role": message.role, "content": text}
    return found | ({"reasoning_content": thoughts} if thoughts else {}) | ({"tool_calls": calls} if calls else {})


def _call(part: Any) -> dict[str, Any]:
    function = {"name": part.name, "arguments": json.dumps(part.arguments)}
    return {"id": part.tool_call_id, "type": "function", "function": function}


def _events(part: Chunk | ChatCompletion, response: Any) -> Iterator[Any]:
    """What `llm` shows of a chunk, or of a whole answer; at the end, what it keeps in its log."""
    if part.reasoning:
        yield StreamEvent(type="reasoning", chunk=part.reasoning)
    if part.text:
        yield StreamEvent(type="text", chunk=part.text)
    for call in part.tool_calls:
        arguments = dict(call.arguments)
        response.add_tool_call(llm.ToolCall(call.name, arguments, call.id))
        yield StreamEvent(type="tool_call_name", chunk=call.name, tool_call_id=call.id)
        yield StreamEvent(type="tool_call_args", chunk=json.dumps(arguments), tool_call_id=call.id)
    if part.finish_reason and part.usage and part.timings:
        usage = part.usage
        response.set_usage(
            input=usage.prompt_tokens, output=usage.generated_tokens, details={"cached_tokens": usage.cached_tokens}
        )
        response.response_json = {
            "finish_reason": part.finish_reason,
            "tokens_per_sec": round(part.timings.tokens_per_sec, 2),
        }
