"""What a request for text may say: sampling, its end, what comes back; names of the server's API and their synonyms.

Ranges are those of SamplingParams where Context has the same; the others stand here, with the field.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict, get_type_hints

from pydantic import Field, TypeAdapter, ValidationError

from .._errors import RequestError
from .._params import SamplingParams
from .names import by_own_names, unknown
from .processors import LogitsProcessor
from .tools import Tool


class Sampling(TypedDict, total=False):
    """How tokens are chosen, and when a text ends. What is left out is as the model's file recommends
    (`general.sampling.*`), else as llama.cpp's programs have it."""

    # the end
    max_tokens: int | None  # 0 or more; None, or -1: until the model ends or the context is full
    min_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)]  # the model does not end before so many (0)
    stop: str | Sequence[str]  # texts that end it; they are not part of it
    stop_token_ids: Sequence[Annotated[int, Field(ge=0)]]  # tokens that end it, as its last one
    ignore_eos: bool  # go on when the model would end
    time_limit_ms: Annotated[int, Field(ge=0)]  # from the first token on; 0 = none
    # choosing
    temperature: float  # 0 = always the most likely token; 0 or more (0.8)
    top_k: int  # keep the K most likely; 0 = all (40)
    top_p: float  # keep the most likely that make up this probability; 0 to 1, 1 = all (0.95)
    min_p: float  # keep those this likely beside the best; 0 to 1, 0 = all (0.05)
    top_n_sigma: Annotated[float, Field(allow_inf_nan=False)]  # keep logits so many deviations below the best; -1 = all
    typical_p: float  # keep the locally typical; 0 to 1, 1 = all (1)
    xtc_probability: Annotated[float, Field(ge=0, le=1)]  # how often the likeliest are left out; 0 = never (0)
    xtc_threshold: Annotated[float, Field(ge=0, le=1)]  # those above this probability, but the last; > 0.5 = off
    dynatemp_range: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # temperature by entropy, +- this; 0 = off (0)
    dynatemp_exponent: Annotated[float, Field(allow_inf_nan=False)]  # how entropy becomes temperature (1)
    mirostat: Annotated[int, Field(ge=0, le=2)]  # 1 or 2 = Mirostat, in place of top_k, top_p, ...; 0 = off (0)
    mirostat_tau: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # the entropy that it aims at (5)
    mirostat_eta: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # its rate of learning (0.1)
    adaptive_target: Annotated[float, Field(le=1, allow_inf_nan=False)]  # probability that adaptive_p aims at; -1 = off
    adaptive_decay: Annotated[float, Field(ge=0, le=0.99)]  # how long it remembers: 1 / (1 - this) tokens (0.9)
    min_keep: Annotated[int, Field(ge=0, le=2**31 - 1)]  # tokens that samplers leave at least (0)
    samplers: Sequence[str]  # their order; those that are not named are off
    seed: int | None  # same seed, same text; None = a new one each time; 0 to 2^32 - 2
    # against repetition
    repeat_penalty: float  # logits of tokens that were there are divided by it; above 0, 1 = off (1)
    frequency_penalty: float  # taken from a logit for each time that its token was there; 0 = off (0)
    presence_penalty: float  # taken once; 0 = off (0)
    penalty_last_n: Annotated[int, Field(ge=0, le=2**24)]  # tokens that the three look at; 0 = off (64)
    dry_multiplier: Annotated[float, Field(ge=0, allow_inf_nan=False)]  # against repeated sequences; 0 = off (0)
    dry_base: Annotated[float, Field(ge=1, allow_inf_nan=False)]  # multiplier * base^(length - allowed) is taken (1.75)
    dry_allowed_length: Annotated[int, Field(ge=0, le=2**31 - 1)]  # tokens that may be repeated for nothing (2)
    dry_penalty_last_n: Annotated[int, Field(ge=0, le=2**24)]  # tokens that DRY looks at; 0 = off (64)
    dry_sequence_breakers: Sequence[str]  # texts over which no repetition reaches
    logit_bias: (
        Mapping[Annotated[int, Field(ge=0)], Annotated[float, Field(lt=math.inf)]]
        | Mapping[str, Annotated[float, Field(lt=math.inf)]]
    )  # token, or text of one -> added to its logit; -inf bans it
    # what it works with
    lora: Mapping[int, float] | Sequence[Mapping[str, Any]]  # number of an adapter of the engine -> scale, here only
    cache_prompt: bool  # go on from what a slot has computed of the same prompt (True)
    slot: Annotated[int, Field(ge=0, le=2**31 - 1)]  # a certain one, below n_parallel
    n_keep: Annotated[int, Field(ge=-1, le=2**31 - 1)]  # tokens of the prompt that a context shift keeps; -1 = all (0)
    n_discard: Annotated[int, Field(ge=0, le=2**31 - 1)]  # tokens that it drops behind them; 0 = half (0)


class Generation(Sampling, total=False):
    """What generate() and stream() take: Sampling, the form of the answer (at most one), and what to tell of it."""

    response_format: Any  # a pydantic class, a type, a JSON schema: the object is in `parsed`
    choice: Sequence[str]  # one of these texts
    regex: str  # what it matches as a whole
    grammar: str  # GBNF
    logits_processor: LogitsProcessor | Sequence[LogitsProcessor]  # functions that change scores; see LLM.generate()
    logprobs: Annotated[int, Field(ge=0)]  # how many of the most likely tokens to tell in place of each


class Conversation(Generation, total=False):
    """What chat() and chat_stream() take beside."""

    tools: Sequence[Tool]  # functions with types and a docstring, or schemas
    tool_choice: str | Mapping[str, Any]  # "auto", "none", "required", or one of them
    parallel_tool_calls: bool  # several calls in one answer, where the template can
    chat_template_kwargs: Mapping[str, Any]  # variables of the template, such as enable_thinking
    reasoning_format: Literal["none", "deepseek", "deepseek-legacy", "auto"]  # "none": thoughts stay in the text
    add_generation_prompt: bool  # the beginning of an answer at the prompt's end (True)


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
_LISTS = ("stop", "samplers", "dry_sequence_breakers")  # of which one may stand for itself
_CHECKED_TOO = ("logprobs", "parallel_tool_calls", "chat_template_kwargs", "reasoning_format", "add_generation_prompt")


def by_kind(given: Mapping[str, Any], known: type, where: str) -> dict[str, dict[str, Any]]:
    """A request's keyword arguments by the class that has them: the fields of a request's JSON under "Sampling", the
    others as they were given. None is as if it had been left out.

    Raises: TypeError for a name that nobody knows, or for a value of another kind.
    """
    found: dict[str, dict[str, Any]] = {"Sampling": {}, "Generation": {}, "Conversation": {}}
    for name, value in by_own_names(given, SYNONYMS).items():
        if name not in known.__annotations__:
            raise unknown(name, known.__annotations__, SYNONYMS, where)
        if value is None or (name == "max_tokens" and value == -1):
            continue
        value = _checked(name, value)
        if name in Sampling.__annotations__:
            found["Sampling"][_IN_JSON.get(name, name)] = _value(name, value)
        else:
            found["Generation" if name in Generation.__annotations__ else "Conversation"][name] = value
    return found


@functools.cache
def _types() -> dict[str, TypeAdapter[Any]]:
    """What the values of fields have to be: as their annotation says if it has a range, else as Context has them."""
    found = {}
    kind: Any
    without_ranges = get_type_hints(Conversation)
    for name, kind in get_type_hints(Conversation, include_extras=True).items():
        if name in Sampling.__annotations__ or name in _CHECKED_TOO:
            field = SamplingParams.model_fields.get(name) if kind == without_ranges[name] else None
            kind = Annotated[field.annotation, field] if field else kind
            found[name] = TypeAdapter(kind)
    return found


def _checked(name: str, value: Any) -> Any:
    """The value as its type. Raises: RequestError where it is none, or is out of range."""
    if name not in (types := _types()):
        return value
    try:
        return types[name].validate_python([value] if name in _LISTS and isinstance(value, str) else value)
    except ValidationError as e:
        why = e.errors()[0]["msg"]
        raise RequestError(f"{name}={value!r:.60}: {why[0].lower()}{why[1:]}") from e


def _value(name: str, value: Any) -> Any:
    if name == "logit_bias":
        return [[token, False if bias == -math.inf else bias] for token, bias in value.items()]
    if name == "lora":
        if isinstance(value, Mapping):
            return [{"id": i, "scale": scale} for i, scale in value.items()]
        return [dict(adapter) for adapter in value]
    if name == "samplers":
        names = ["typ_p" if sampler == "typical_p" else sampler for sampler in value]
        if wrong := next((sampler for sampler in names if sampler not in SAMPLERS), None):
            raise TypeError(f"there is no sampler {wrong!r}; there are {', '.join(SAMPLERS)}")
        return names
    return list(value) if name in _LISTS else value
