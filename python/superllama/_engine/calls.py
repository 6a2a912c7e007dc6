"""Requests as values: what is sent, and how what comes back is read. LLM and AsyncLLM send the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from .._errors import GrammarError, PromptError, RequestError
from .fields import Conversation, Generation, by_kind
from .formats import Format, format_of
from .results import (
    ChatCompletion,
    Chunk,
    Completion,
    FinishReason,
    Ranked,
    Timings,
    TokenLogprob,
    Usage,
)
from .tools import tool_calls_of, tool_schemas

T = TypeVar("T")
Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and what its JSON is read as."""

    path: str
    body: Mapping[str, Any] | None
    read: Callable[[Any], T]
    method: str = "POST"


@dataclasses.dataclass(frozen=True)
class Stream:
    """A request that streams, and how each event is read. A reader is made for each time it is sent."""

    path: str
    body: Mapping[str, Any]
    reader: Callable[[], Callable[[Any], Iterator[Chunk]]]


# ---------------------------------------------------------------- text

_COMPLETION_FIELDS = [
    *("index", "content", "tokens", "stop_type", "stopping_word", "timings"),
    *("tokens_evaluated", "tokens_predicted", "completion_probabilities"),
]


def generate_calls(
    prompts: Prompt | Sequence[Prompt], n: int, request: Mapping[str, Any]
) -> Call[Completion] | list[Call[Completion]]:
    """Texts that go on from prompts, a request for each: one for one, a list for a list."""
    if not _are_several(prompts):
        return _generate_call(0, prompts, n, request)
    return [_generate_call(i, prompt, n, request) for i, prompt in enumerate(prompts)]


def _generate_call(i: int, prompt: object, n: int, request: Mapping[str, Any]) -> Call[Completion]:
    body, form = _text_body(_prompt(i, prompt), request)
    body["response_fields"] = _COMPLETION_FIELDS
    wanted = body.get("n_predict")
    if n != 1:
        body["n_cmpl"] = n

    def read(answer: Any) -> Completion:
        found = answer if isinstance(answer, list) else [answer]
        first, *others = [_completion(one, form) if wanted != 0 else _prompt_only(one) for one in found]
        return dataclasses.replace(first, alternatives=tuple(others))

    return Call("/completion", body, read)


def infill_call(prefix: str, suffix: str, request: Mapping[str, Any]) -> Call[Completion]:
    """What stands between two texts."""
    body, form = _text_body("", request)
    body |= {"input_prefix": prefix, "input_suffix": suffix}
    return Call("/infill", body, lambda answer: _completion(answer, form))


def stream_call(prompts: Prompt | Sequence[Prompt], request: Mapping[str, Any]) -> Stream:
    """The same piece by piece."""
    given = list(prompts) if _are_several(prompts) else [prompts]
    checked = [_prompt(i, prompt) for i, prompt in enumerate(given)]
    body, _ = _text_body(checked if len(checked) != 1 else checked[0], request)
    _checked_stream(body)
    return Stream("/completion", body | {"stream": True, "return_progress": True}, lambda: _text_chunks)


def _checked_stream(body: Mapping[str, Any]) -> None:
    """Raises: RequestError where there is nothing to stream."""
    if body.get("n_predict") == 0:
        raise RequestError("max_tokens is 0, and a stream has at least one token; use generate()")


def _text_body(prompt: Any, request: Mapping[str, Any]) -> tuple[dict[str, Any], Format]:
    kinds = by_kind(request, Generation, "generate()")
    body, asked = kinds["Sampling"], kinds["Generation"]
    body["prompt"] = prompt
    logprobs = asked.pop("logprobs", None)
    if logprobs is not None:
        body["n_probs"] = max(logprobs, 1)
    form = format_of(**asked)
    if form.schema is not None:
        body["json_schema"] = dict(form.schema)
    elif form.grammar is not None:
        body["grammar"] = form.grammar
    return body | {"return_tokens": True}, form


def _are_several(prompts: object) -> bool:
    """Whether this is a list of prompts, and not one of tokens."""
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Sequence):
        return False
    return not (prompts and isinstance(prompts[0], int))


def _prompt(i: int, prompt: object) -> Any:
    where = f"prompt {i}"
    if isinstance(prompt, str):
        try:
            prompt.encode()
        except UnicodeEncodeError as e:
            raise PromptError(f"{where} is not UTF-8: {e}") from e
        if not prompt:
            raise PromptError(f"{where} is empty")
        return prompt
    if isinstance(prompt, Mapping):  # with images, as the API has it
        return dict(prompt)
    if isinstance(prompt, Sequence) and not isinstance(prompt, bytes) and prompt and all(map(_is_token, prompt)):
        return list(prompt)
    raise PromptError(f"{where} must be a text or a list of tokens that is not empty, not {prompt!r:.60}")


def _is_token(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _completion(answer: Mapping[str, Any], form: Format) -> Completion:
    text = answer["content"]
    reason, stopped_by = _end(answer)
    return Completion(
        text=text,
        tokens=tuple(answer.get("tokens", ())),
        finish_reason=reason,
        stop_reason=stopped_by,
        usage=_usage(answer["timings"], answer["tokens_predicted"]),
        timings=timings_of(answer["timings"]),
        logprobs=_logprobs(answer.get("completion_probabilities")),
        parsed=form.read(text),
    )


def _prompt_only(answer: Mapping[str, Any]) -> Completion:
    """With max_tokens=0, for which the server chooses a token all the same."""
    timings = answer["timings"]
    return Completion("", (), "length", None, _usage(timings, 0), timings_of(timings))


def _text_chunks(event: Any) -> Iterator[Chunk]:
    if progress := event.get("prompt_progress"):
        yield Chunk("", index=event.get("index", 0), progress=_share(progress))
    elif event.get("stop"):
        reason, _ = _end(event)
        yield Chunk(
            event["content"],
            tuple(event.get("tokens", ())),
            event.get("index", 0),
            logprobs=_logprobs(event.get("completion_probabilities")),
            finish_reason=reason,
            usage=_usage(event["timings"], event["tokens_predicted"]),
            timings=timings_of(event["timings"]),
        )
    else:
        yield Chunk(
            event["content"],
            tuple(event.get("tokens", ())),
            event.get("index", 0),
            logprobs=_logprobs(event.get("completion_probabilities")),
        )


def _end(answer: Mapping[str, Any]) -> tuple[FinishReason, str | None]:
    if answer["stop_type"] == "word":
        return "stop", answer["stopping_word"]
    return ("stop" if answer["stop_type"] == "eos" else "length"), None


def _usage(timings: Mapping[str, Any], generated: int) -> Usage:
    cached = timings.get("cache_n", 0)
    return Usage(cached + timings["prompt_n"], cached, generated)


def timings_of(timings: Mapping[str, Any]) -> Timings:
    """The server's `timings`."""
    return Timings(
        prompt_ms=timings["prompt_ms"],
        prompt_tokens_per_sec=timings["prompt_per_second"] or 0.0,
        generated_ms=timings["predicted_ms"],
        tokens_per_sec=timings["predicted_per_second"] or 0.0,
        draft_tokens=timings.get("draft_n", 0),
        draft_accepted=timings.get("draft_n_accepted", 0),
    )


def _share(progress: Mapping[str, Any]) -> float:
    return float(progress["processed"]) / max(1, int(progress["total"]))


def _logprobs(entries: Sequence[Mapping[str, Any]] | None) -> tuple[TokenLogprob, ...] | None:
    if not entries:
        return None
    return tuple(
        TokenLogprob(
            entry.get("id", -1),
            entry["token"],
            entry["logprob"],
            tuple(TokenLogprob(t.get("id", -1), t["token"], t["logprob"]) for t in entry.get("top_logprobs", ())),
        )
        for entry in entries
    )


# ---------------------------------------------------------------- conversations


def chat_body(
    messages: object, request: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], Format, Mapping[str, Callable[..., Any]]]:
    """What /v1/chat/completions and /apply-template take, the form of the answer, and functions among the tools."""
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if not isinstance(messages, Sequence) or not all(isinstance(message, Mapping) for message in messages):
        raise PromptError("messages are a list of {'role': ..., 'content': ...}, or one text of the user")
    if not messages:
        raise PromptError("there are no messages; give at least one {'role': 'user', 'content': ...}")
    kinds = by_kind(request, Conversation, where)
    body, asked, template = kinds["Sampling"], kinds["Generation"], kinds["Conversation"]
    body["messages"] = [dict(message) for message in messages]
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
    return body | template, form, functions


def chat_call(messages: object, request: Mapping[str, Any]) -> Call[ChatCompletion]:
    """An answer in a conversation."""
    body, form, functions = chat_body(messages, request, "chat()")
    if body.get("n_predict") == 0:
        raise RequestError("max_tokens is 0, and an answer has at least one token")

    def read(answer: Any) -> ChatCompletion:
        (choice,) = answer["choices"]
        message = choice["message"]
        text = message.get("content") or ""
        calls = tuple(tool_calls_of(message.get("tool_calls") or (), functions))
        return ChatCompletion(
            text=text,
            reasoning=message.get("reasoning_content"),
            tool_calls=calls,
            finish_reason=choice["finish_reason"],
            usage=_chat_usage(answer),
            timings=timings_of(answer["timings"]),
            message=message,
            logprobs=_chat_logprobs(choice),
            parsed=form.read(text),
        )

    return Call("/v1/chat/completions", body, read)


def chat_stream(messages: object, request: Mapping[str, Any]) -> Stream:
    """The same piece by piece; tool calls come in the last chunk, whole."""
    body, _, functions = chat_body(messages, request, "chat_stream()")
    _checked_stream(body)
    body |= {"stream": True, "return_progress": True, "stream_options": {"include_usage": True}}
    return Stream("/v1/chat/completions", body, lambda: _ChatChunks(functions))


def chat_request(messages: object, stream: bool, request: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The path and the body of an answer in a conversation, for who reads its JSON."""
    body, _, _ = chat_body(messages, request, "chat")
    return "/v1/chat/completions", body | ({"stream": True} if stream else {})


class _ChatChunks:
    """Reads the events of one answer. Its numbers come after its end, in an event of their own."""

    def __init__(self, functions: Mapping[str, Callable[..., Any]]) -> None:
        self.functions = functions
        self.calls: list[dict[str, Any]] = []
        self.finish: FinishReason | None = None

    def __call__(self, event: Any) -> Iterator[Chunk]:
        if progress := event.get("prompt_progress"):
            yield Chunk("", progress=_share(progress))
        for choice in event.get("choices", ()):
            self.finish = choice.get("finish_reason") or self.finish
            delta = choice.get("delta", {})
            for call in delta.get("tool_calls") or ():
                self._add(call)
            text, reasoning = delta.get("content") or "", delta.get("reasoning_content") or ""
            logprobs = _chat_logprobs(choice)
            if text or reasoning or logprobs:
                yield Chunk(text, reasoning=reasoning, logprobs=logprobs)
        if event.get("usage") and "timings" in event and self.finish:
            yield Chunk(
                "",
                finish_reason=self.finish,
                usage=_chat_usage(event),
                timings=timings_of(event["timings"]),
                tool_calls=tuple(tool_calls_of(self.calls, self.functions)),
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
    return _logprobs((choice.get("logprobs") or {}).get("content"))


def template_call(messages: object, request: Mapping[str, Any]) -> Call[str]:
    """The prompt that a conversation becomes."""
    body, _, _ = chat_body(messages, request, "apply_chat_template()")
    return Call("/apply-template", body, lambda answer: str(answer["prompt"]))


# ---------------------------------------------------------------- the rest


def embed_call(inputs: Any, dimensions: int | None, normalize: bool | int) -> Call[Any]:
    """One vector for one text or list of tokens, a list of them for a list."""
    several = _are_several(inputs)
    given = list(inputs) if several else [inputs]
    if several and not given:
        return Call("", None, lambda answer: [])
    if dimensions is not None and dimensions < 1:
        raise RequestError(f"dimensions must be 1 or more, not {dimensions}")
    # the first numbers of a vector have a length of their own
    whole = dimensions is None
    body = {
        "content": [_prompt(i, item) for i, item in enumerate(given)],
        "embd_normalize": (2 if normalize is True else int(normalize)) if whole else -1,
    }

    def read(answer: Any) -> Any:
        rows = sorted(answer, key=lambda row: row["index"])
        vectors = [row["embedding"][0] if len(row["embedding"]) == 1 else row["embedding"] for row in rows]
        if dimensions is not None:
            vectors = [_shortened(vector, dimensions, bool(normalize)) for vector in vectors]
        return vectors if several else vectors[0]

    return Call("/embeddings", body, read)


def _shortened(vector: list[float], dimensions: int, normalize: bool) -> list[float]:
    if dimensions > len(vector):
        raise RequestError(f"dimensions is {dimensions}, and the model's vectors have {len(vector)}")
    part = vector[:dimensions]
    length = sum(x * x for x in part) ** 0.5
    return [x / length for x in part] if normalize and length > 0 else part


def rerank_call(query: str, documents: Sequence[str], top_n: int | None) -> Call[list[Ranked]]:
    """Documents by their relevance, the best first."""
    given = list(documents)
    if isinstance(documents, str) or not all(isinstance(document, str) for document in given):
        raise PromptError("documents are a list of texts")
    if not given:
        return Call("", None, lambda answer: [])
    body = {"query": query, "documents": given} | ({} if top_n is None else {"top_n": top_n})

    def read(answer: Any) -> list[Ranked]:
        found = [Ranked(row["index"], row["relevance_score"], given[row["index"]]) for row in answer["results"]]
        return sorted(found, key=lambda row: -row.score)

    return Call("/v1/rerank", body, read)


def slot_call(action: str, slot: int, filename: str | None) -> Call[int]:
    """Tokens of a slot that were saved, read or forgotten."""
    names = {"save": "n_saved", "restore": "n_restored", "erase": "n_erased"}
    body = {} if filename is None else {"filename": filename}
    return Call(f"/slots/{int(slot)}?action={action}", body, lambda answer: int(answer[names[action]]))


def tokenize_call(text: str, add_special: bool, parse_special: bool) -> Call[list[int]]:
    """The tokens of a text."""
    body = {"content": text, "add_special": add_special, "parse_special": parse_special}
    return Call("/tokenize", body, lambda answer: list(answer["tokens"]))


def detokenize_call(tokens: Sequence[int]) -> Call[str]:
    """The text of tokens."""
    return Call("/detokenize", {"tokens": list(tokens)}, lambda answer: str(answer["content"]))
