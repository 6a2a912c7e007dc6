"""What a request for text may say: sampling, its end, what comes back; names of the server's API and their synonyms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from .names import by_own_names, unknown
from .tools import Tool


class Sampling(TypedDict, total=False):
    """How tokens are chosen, and when a text ends. What is left out is as the model's file recommends
    (`general.sampling.*`), else as llama.cpp's programs have it."""

    # the end
    max_tokens: int | None  # None, or -1: until the model ends or the context is full
    stop: str | Sequence[str]  # texts that end it; they are not part of it
    ignore_eos: bool
    time_limit_ms: int  # from the first token on
    # choosing
    temperature: float  # 0 = always the most likely token
    top_k: int
    top_p: float
    min_p: float
    top_n_sigma: float
    typical_p: float
    xtc_probability: float
    xtc_threshold: float
    dynatemp_range: float
    dynatemp_exponent: float
    mirostat: int
    mirostat_tau: float
    mirostat_eta: float
    adaptive_target: float
    adaptive_decay: float
    min_keep: int
    samplers: Sequence[str]  # their order
    seed: int | None  # same seed, same text; None = a new one each time
    # against repetition
    repeat_penalty: float
    frequency_penalty: float
    presence_penalty: float
    penalty_last_n: int
    dry_multiplier: float
    dry_base: float
    dry_allowed_length: int
    dry_penalty_last_n: int
    dry_sequence_breakers: Sequence[str]
    logit_bias: Mapping[int, float] | Mapping[str, float]  # token, or text of one -> added; -inf bans it
    # what it works with
    lora: Mapping[int, float] | Sequence[Mapping[str, Any]]  # number of an adapter of the engine -> scale, here only
    cache_prompt: bool  # go on from what a slot has computed of the same prompt (True)
    slot: int  # a certain one
    n_keep: int  # tokens of the prompt that stay when a context is shifted
    n_discard: int


class Generation(Sampling, total=False):
    """What generate() and stream() take: Sampling, the form of the answer (at most one), and what to tell of it."""

    response_format: Any  # a pydantic class, a type, a JSON schema: the object is in `parsed`
    choice: Sequence[str]  # one of these texts
    regex: str  # what it matches as a whole
    grammar: str  # GBNF
    logprobs: int  # the most likely tokens in place of each


class Conversation(Generation, total=False):
    """What chat() and chat_stream() take beside."""

    tools: Sequence[Tool]  # functions with types and a docstring, or schemas
    tool_choice: str | Mapping[str, Any]  # "auto", "none", "required", or one of them
    parallel_tool_calls: bool
    chat_template_kwargs: Mapping[str, Any]  # variables of the template, such as enable_thinking
    reasoning_format: str  # "none": thoughts stay in the text; "deepseek": they are in `reasoning`
    add_generation_prompt: bool


SAMPLERS = (
    *("penalties", "dry", "top_n_sigma", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature", "infill"),
    "adaptive_p",
)

SYNONYMS = {
    "max_new_tokens": "max_tokens",
    "max_completion_tokens": "max_tokens",
    "n_predict": "max_tokens",
    "num_predict": "max_tokens",
    "temp": "temperature",
    "typ_p": "typical_p",
    "repetition_penalty": "repeat_penalty",
    "repeat_last_n": "penalty_last_n",
    "stop_strings": "stop",
    "t_max_predict_ms": "time_limit_ms",
    "id_slot": "slot",
}
_IN_JSON = {
    "max_tokens": "n_predict",
    "penalty_last_n": "repeat_last_n",
    "time_limit_ms": "t_max_predict_ms",
    "slot": "id_slot",
}


def by_kind(given: Mapping[str, Any], known: type, where: str) -> dict[str, dict[str, Any]]:
    """A request's keyword arguments by the class that has them: the fields of a request's JSON under "Sampling", the
    others as they were given. None is as if it had been left out.

    Raises: TypeError for a name that nobody knows, or for a value of another kind.
    """
    found: dict[str, dict[str, Any]] = {"Sampling": {}, "Generation": {}, "Conversation": {}}
    for name, value in by_own_names(given, SYNONYMS).items():
        if name not in known.__annotations__:
            raise unknown(name, [*known.__annotations__, *SYNONYMS], where)
        if value is None:
            continue
        if name in Sampling.__annotations__:
            found["Sampling"][_IN_JSON.get(name, name)] = _value(name, value)
        else:
            found["Generation" if name in Generation.__annotations__ else "Conversation"][name] = value
    return found


def _value(name: str, value: Any) -> Any:
    if name == "logit_bias":
        return [[token, False if bias == -math.inf else bias] for token, bias in value.items()]
    if name == "lora":
        if isinstance(value, Mapping):
            return [{"id": i, "scale": scale} for i, scale in value.items()]
        return [dict(adapter) for adapter in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise TypeError(f"{name} must be a finite number, not {value}")
    if name in ("stop", "samplers", "dry_sequence_breakers"):
        values = [value] if isinstance(value, str) else list(value)
        values = ["typ_p" if v == "typical_p" else v for v in values] if name == "samplers" else values
        if name == "samplers" and (wrong := next((v for v in values if v not in SAMPLERS), None)):
            raise TypeError(f"there is no sampler {wrong!r}; there are {', '.join(SAMPLERS)}")
        return values
    return value
