"""Requests for texts that go on from prompts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .calls import (
    Call,
    Prompt,
    Stream,
    are_several,
    check_stream,
    checked_prompt,
    logprobs_of,
    progress_share,
    timings_of,
)
from .fields import Generation, by_kind
from .formats import Format, format_of
from .media import AskSenses, media_prompt
from .processors import LogitsProcessor, processors_of
from .results import Chunk, Completion, FinishReason, Usage

_COMPLETION_FIELDS = [
    *("index", "content", "tokens", "stop_type", "stopping_word", "timings"),
    *("tokens_evaluated", "tokens_predicted", "completion_probabilities"),
]


def generate_calls(
    prompts: Prompt | Sequence[Prompt], n: int, request: Mapping[str, Any], senses: AskSenses
) -> Call[Completion] | list[Call[Completion]]:
    """Texts that go on from prompts, a request for each: one for one, a list for a list."""
    body, form, processors = _text_body(request)
    body["response_fields"] = _COMPLETION_FIELDS
    if n != 1:
        body["n_cmpl"] = n

    def read(answer: Any) -> Completion:
        found = answer if isinstance(answer, list) else [answer]
        read_one = _prompt_only if body.get("n_predict") == 0 else lambda one: _completion(one, form)
        first, *others = map(read_one, found)
        return dataclasses.replace(first, alternatives=tuple(others))

    def call(i: int, prompt: object) -> Call[Completion]:
        return Call("/completion", body | {"prompt": _prompt(i, prompt, senses)}, read, processors=processors)

    return [call(i, prompt) for i, prompt in enumerate(prompts)] if are_several(prompts) else call(0, prompts)


def infill_call(prefix: str, suffix: str, request: Mapping[str, Any]) -> Call[Completion]:
    """What stands between two texts."""
    body, form, processors = _text_body(request)
    body |= {"prompt": "", "input_prefix": prefix, "input_suffix": suffix}
    return Call("/infill", body, lambda answer: _completion(answer, form), processors=processors)


def stream_call(prompts: Prompt | Sequence[Prompt], request: Mapping[str, Any], senses: AskSenses) -> Stream:
    """The same piece by piece."""
    given = list(prompts) if are_several(prompts) else [prompts]
    checked = [_prompt(i, prompt, senses) for i, prompt in enumerate(given)]
    body, _, processors = _text_body(request)
    body["prompt"] = checked if len(checked) != 1 else checked[0]
    check_stream(body)
    body |= {"stream": True, "return_progress": True}
    return Stream("/completion", body, lambda: _text_chunks, processors)


def _prompt(i: int, prompt: object, senses: AskSenses) -> Any:
    if isinstance(prompt, Mapping):
        prompt = media_prompt(prompt, f"prompt {i}", senses)
    return checked_prompt(i, prompt)


def _text_body(request: Mapping[str, Any]) -> tuple[dict[str, Any], Format, tuple[LogitsProcessor, ...]]:
    kinds = by_kind(request, Generation, "generate()")
    body, asked = kinds["Sampling"], kinds["Generation"]
    processors = processors_of(asked.pop("logits_processor", None))
    logprobs = asked.pop("logprobs", None)
    if logprobs is not None:
        body["n_probs"] = max(logprobs, 1)
    form = format_of(**asked)
    if form.schema is not None:
        body["json_schema"] = dict(form.schema)
    elif form.grammar is not None:
        body["grammar"] = form.grammar
    return body | {"return_tokens": True}, form, processors


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
        logprobs=logprobs_of(answer.get("completion_probabilities")),
        parsed=form.read(text),
    )


def _prompt_only(answer: Mapping[str, Any]) -> Completion:
    """With max_tokens=0, for which the server chooses a token all the same."""
    timings = answer["timings"]
    return Completion("", (), "length", None, _usage(timings, 0), timings_of(timings))


def _text_chunks(event: Any) -> Iterator[Chunk]:
    if progress := event.get("prompt_progress"):
        yield Chunk("", index=event.get("index", 0), progress=progress_share(progress))
    elif event.get("stop"):
        reason, _ = _end(event)
        yield Chunk(
            event["content"],
            tuple(event.get("tokens", ())),
            event.get("index", 0),
            logprobs=logprobs_of(event.get("completion_probabilities")),
            finish_reason=reason,
            usage=_usage(event["timings"], event["tokens_predicted"]),
            timings=timings_of(event["timings"]),
        )
    else:
        yield Chunk(
            event["content"],
            tuple(event.get("tokens", ())),
            event.get("index", 0),
            logprobs=logprobs_of(event.get("completion_probabilities")),
        )


def _end(answer: Mapping[str, Any]) -> tuple[FinishReason, str | None]:
    if answer["stop_type"] == "word":
        return "stop", answer["stopping_word"]
    return ("stop" if answer["stop_type"] == "eos" else "length"), None


def _usage(timings: Mapping[str, Any], generated: int) -> Usage:
    cached = timings.get("cache_n", 0)
    return Usage(cached + timings["prompt_n"], cached, generated)
