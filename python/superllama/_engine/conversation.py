"""Requests for answers in conversations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from .._errors import GrammarError, PromptError, RequestError
from .calls import Call, Stream, check_stream, logprobs_of, progress_share, timings_of
from .fields import Conversation, by_kind
from .formats import Format, format_of
from .media import AskSenses, with_media
from .processors import LogitsProcessor, processors_of
from .results import ChatCompletion, Chunk, FinishReason, TokenLogprob, Usage
from .tools import ToolCall, tool_calls_of, tool_schemas


@dataclasses.dataclass(frozen=True)
class Asked:
    """What /v1/chat/completions and /apply-template take, and what of it stays here."""

    body: dict[str, Any]
    form: Format  # of the answer
    functions: Mapping[str, Callable[..., Any]]  # among the tools
    processors: tuple[LogitsProcessor, ...]


def chat_body(messages: object, request: Mapping[str, Any], where: str, senses: AskSenses) -> Asked:
    """A conversation as the API has it."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise PromptError("messages are a list of {'role': ..., 'content': ...}, or one text of the user")
    if not messages:
        raise PromptError("there are no messages; give at least one {'role': 'user', 'content': ...}")
    for i, message in enumerate(messages):
        _check_message(i, message)
    kinds = by_kind(request, Conversation, where)
    body, asked, template = kinds["Sampling"], kinds["Generation"], kinds["Conversation"]
    body["messages"] = with_media(messages, senses)
    processors = processors_of(asked.pop("logits_processor", None))
    logprobs = asked.pop("logprobs", None)
    if logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": logprobs}
    schemas, functions = tool_schemas(template.pop("tools", ()))
    form = format_of(**asked)
    if schemas:
        if asked:
            raise GrammarError("an answer that may call tools has no form of its own; leave out the tools, or the form")
        body["tools"] = schemas
    if form.schema is not None:
        body["response_format"] = {"type": "json_schema", "json_schema": {"schema": dict(form.schema)}}
    elif form.grammar is not None:
        body["grammar"] = form.grammar
    return Asked(body | template, form, functions, processors)


def _check_message(i: int, message: Mapping[str, Any]) -> None:
    """Raises: PromptError for a message that no template could show."""
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise PromptError(f"message {i} has no 'role', such as 'system', 'user' or 'assistant': {dict(message)!r:.80}")
    if content is None and role != "assistant" and "images" not in message:
        raise PromptError(f"message {i}, of role {role!r}, has no 'content'")
    parts = [] if content is None or isinstance(content, str) else content
    if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) and "type" in part for part in parts):
        raise PromptError(
            f"message {i}: 'content' is a text, or a list of parts such as {{'type': 'text', 'text': ...}}, not "
            f"{content!r:.80}"
        )


def chat_call(messages: object, request: Mapping[str, Any], senses: AskSenses) -> Call[ChatCompletion]:
    """An answer in a conversation."""
    asked = chat_body(messages, request, "chat()", senses)
    if asked.body.get("n_predict") == 0:
        raise RequestError("max_tokens is 0, and an answer has at least one token")

    def read(answer: Any) -> ChatCompletion:
        (choice,) = answer["choices"]
        message = choice["message"]
        text = message.get("content") or ""
        calls = tuple(tool_calls_of(message.get("tool_calls") or (), asked.functions))
        _check_called(asked.body, calls, text)
        return ChatCompletion(
            text=text,
            reasoning=message.get("reasoning_content"),
            tool_calls=calls,
            finish_reason=choice["finish_reason"],
            usage=_chat_usage(answer),
            timings=timings_of(answer["timings"]),
            message=message,
            logprobs=_chat_logprobs(choice),
            parsed=asked.form.read(text),
        )

    return Call("/v1/chat/completions", asked.body, read, processors=asked.processors)


def chat_stream(messages: object, request: Mapping[str, Any], senses: AskSenses) -> Stream:
    """The same piece by piece; tool calls come in the last chunk, whole."""
    asked = chat_body(messages, request, "chat_stream()", senses)
    check_stream(asked.body)
    body = asked.body | {"stream": True, "return_progress": True, "stream_options": {"include_usage": True}}
    return Stream("/v1/chat/completions", body, lambda: _ChatChunks(asked), asked.processors)


def chat_request(
    messages: object, stream: bool, request: Mapping[str, Any], senses: AskSenses
) -> tuple[str, dict[str, Any], tuple[LogitsProcessor, ...]]:
    """The path and the body of an answer, for who reads its JSON, and functions that change logits."""
    asked = chat_body(messages, request, "chat", senses)
    return "/v1/chat/completions", asked.body | ({"stream": True} if stream else {}), asked.processors


def _check_called(body: Mapping[str, Any], calls: Sequence[ToolCall], text: str) -> None:
    """Raises: GrammarError where a tool had to be called, and none was: the model may say something first."""
    if not calls and body.get("tool_choice", "auto") not in ("auto", "none"):
        raise GrammarError(
            f"no tool was called, as tool_choice={body['tool_choice']!r:.80} asked for, perhaps for the answer was cut "
            f"(max_tokens) while the model said something first: {text:.200}"
        )


class _ChatChunks:
    """Reads the events of one answer. Its numbers come after its end, in an event of their own."""

    def __init__(self, asked: Asked) -> None:
        self.asked = asked
        self.text = ""
        self.calls: list[dict[str, Any]] = []
        self.finish: FinishReason | None = None

    def __call__(self, event: Any) -> Iterator[Chunk]:
        if progress := event.get("prompt_progress"):
            yield Chunk("", progress=progress_share(progress))
        for choice in event.get("choices", ()):
            self.finish = choice.get("finish_reason") or self.finish
            delta = choice.get("delta", {})
            for call in delta.get("tool_calls") or ():
                self._add(call)
            text, reasoning = delta.get("content") or "", delta.get("reasoning_content") or ""
            logprobs = _chat_logprobs(choice)
            self.text += text
            if text or reasoning or logprobs:
                yield Chunk(text, reasoning=reasoning, logprobs=logprobs)
        if event.get("usage") and "timings" in event and self.finish:
            calls = tuple(tool_calls_of(self.calls, self.asked.functions))
            _check_called(self.asked.body, calls, self.text)
            yield Chunk(
                "",
                finish_reason=self.finish,
                usage=_chat_usage(event),
                timings=timings_of(event["timings"]),
                tool_calls=calls,
            )

    def _add(self, call: Mapping[str, Any]) -> None:
        while len(self.calls) <= call["index"]:
            self.calls.append({"id": "", "function": {"name": "", "arguments": ""}})
        whole = self.calls[call["index"]]
        whole["id"] = call.get("id") or whole["id"]
        for part in ("name", "arguments"):
            whole["function"][part] += call.get("function", {}).get(part) or ""


def _chat_usage(answer: Mapping[str, Any]) -> Usage:
    usage = answer["usage"]
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", answer["timings"].get("cache_n", 0))
    return Usage(usage["prompt_tokens"], cached, usage["completion_tokens"])


def _chat_logprobs(choice: Mapping[str, Any]) -> tuple[TokenLogprob, ...] | None:
    return logprobs_of((choice.get("logprobs") or {}).get("content"))


def template_call(messages: object, request: Mapping[str, Any], senses: AskSenses) -> Call[str]:
    """The prompt that a conversation becomes."""
    asked = chat_body(messages, request, "apply_chat_template()", senses)
    return Call("/apply-template", asked.body, lambda answer: str(answer["prompt"]))
