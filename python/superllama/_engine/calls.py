"""Requests as values: what is sent, and how what comes back is read. LLM and AsyncLLM send the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, TypeVar

from .._errors import PromptError, RequestError
from .processors import LogitsProcessor
from .results import Chunk, Timings, TokenLogprob

T = TypeVar("T")
Prompt = str | Sequence[int] | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and what its JSON is read as; without a path there is nothing to ask."""

    path: str
    body: Mapping[str, Any] | None
    read: Callable[[Any], T]
    method: str = "POST"
    processors: tuple[LogitsProcessor, ...] = ()  # that change logits


@dataclasses.dataclass(frozen=True)
class Stream:
    """A request that streams, and how each event is read. A reader is made for each time it is sent."""

    path: str
    body: Mapping[str, Any]
    reader: Callable[[], Callable[[Any], Iterator[Chunk]]]
    processors: tuple[LogitsProcessor, ...] = ()


# ---------------------------------------------------------------- the engine's life


def pause_call() -> Call[bool]:
    """Whether the memory is given back now; else it will be, when what runs has ended."""
    return Call("/superllama/pause", {}, lambda status: bool(status["state"] == "paused"))


def resume_call() -> Call[bool]:
    """Whether it serves again; else it will."""
    return Call("/superllama/resume", {}, lambda status: bool(status["state"] == "ready"))


# ---------------------------------------------------------------- what is sent


def are_several(prompts: object) -> bool:
    """Whether this is a list of prompts, and not one of tokens."""
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Sequence):
        return False
    return not (prompts and isinstance(prompts[0], int))


def checked_prompt(i: int, prompt: object) -> Any:
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


def check_stream(body: Mapping[str, Any]) -> None:
    """Raises: RequestError where there is nothing to stream."""
    if body.get("n_predict") == 0:
        raise RequestError("max_tokens is 0, and a stream has at least one token; use generate()")


# ---------------------------------------------------------------- what comes back


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


def progress_share(progress: Mapping[str, Any]) -> float:
    return float(progress["processed"]) / max(1, int(progress["total"]))


def logprobs_of(entries: Sequence[Mapping[str, Any]] | None) -> tuple[TokenLogprob, ...] | None:
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


# ---------------------------------------------------------------- tokens and slots


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
