"""What requests may say: ranges, names, places; without an engine."""

from __future__ import annotations

import math
from typing import Any, get_type_hints

import pytest
from pydantic import ValidationError

import superllama
from superllama._engine.fields import Conversation, Generation, Sampling, by_kind
from superllama._engine.llm import LLM
from superllama._engine.names import unknown
from superllama._engine.options import EngineOptions

WRONG: dict[str, list[Any]] = {
    "max_tokens": [-5, 2.5, "many"],
    "temperature": [-1, math.nan, math.inf, "hot"],
    "top_k": [-1, 2**31],
    "top_p": [3, -0.1, math.nan],
    "min_p": [-5, 1.1],
    "typical_p": [-1],
    "repeat_penalty": [0, -1],
    "presence_penalty": [math.inf],
    "seed": [-3, 2**32 - 1, 2**33],
    "stop": ["", ["a", ""], 3],
    "logit_bias": [{5: math.nan}, {5: math.inf}, {-1: 1.0}],
}


@pytest.mark.parametrize("name", WRONG)
def test_ranges_are_those_of_context(name: str) -> None:
    for value in WRONG[name]:
        with pytest.raises(ValidationError, match=name):
            superllama.SamplingParams(**{name: value})
        with pytest.raises(superllama.RequestError, match=f"^{name}="):
            by_kind({name: value}, Generation, "generate()")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mirostat", 7),
        ("xtc_probability", 9),
        ("adaptive_decay", 1.0),
        ("dry_base", 0.5),
        ("dry_allowed_length", -4),
        ("min_keep", -3),
        ("penalty_last_n", -1),
        ("n_keep", -4),
        ("n_discard", -5),
        ("slot", -1),
        ("time_limit_ms", -4),
        ("logprobs", -1),
        ("reasoning_format", "loud"),
        ("chat_template_kwargs", 3),
        ("cache_prompt", "perhaps"),
        ("lora", {"x": 1.0}),
    ],
)
def test_what_context_has_not_has_ranges_too(name: str, value: Any) -> None:
    with pytest.raises(superllama.RequestError, match=f"^{name}="):
        by_kind({name: value}, Conversation, "chat()")


def test_values_arrive() -> None:
    given = {
        **{"max_tokens": 3, "temp": 0, "stop": "a", "samplers": ["typical_p", "top_k"], "seed": None},
        **{"logit_bias": {" a": 1.5, "b": -math.inf}, "lora": {0: 0.5}, "repeat_last_n": 5},
    }
    found = by_kind(given, Generation, "generate()")["Sampling"]
    assert found == {
        **{"n_predict": 3, "temperature": 0.0, "stop": ["a"], "samplers": ["typ_p", "top_k"]},
        **{"logit_bias": [[" a", 1.5], ["b", False]], "lora": [{"id": 0, "scale": 0.5}], "repeat_last_n": 5},
    }
    assert by_kind({"max_tokens": -1}, Generation, "generate()")["Sampling"] == {}
    assert set(get_type_hints(Sampling)) >= set(superllama.SamplingParams.model_fields) - {"grammar"}


@pytest.mark.parametrize(
    ("name", "meant"),
    [("n_contexts", "n_ctx"), ("n_paralel", "n_parallel"), ("cache_reus", "cache_reuse"), ("zzz", None)],
)
def test_own_names_are_proposed_rather_than_others(name: str, meant: str | None) -> None:
    error = unknown(name, EngineOptions.__annotations__, ["no_context_shift", "cache_reuse", "ctx_size"], "LLM")
    assert str(error) == f"LLM has no parameter {name!r}" + (f"; did you mean {meant}?" if meant else "")


@pytest.mark.parametrize("method", ["generate", "stream", "chat", "chat_stream", "apply_chat_template"])
def test_sampling_is_given_by_name(method: str) -> None:
    for kind in (superllama.LLM, superllama.AsyncLLM):
        with pytest.raises(TypeError, match=rf"in an object \(here: dict\): {method}\(\w+, temperature=0"):
            getattr(kind, method)(kind.__new__(kind), "a", {"max_tokens": 3})


@pytest.mark.parametrize(
    ("message", "why"),
    [
        ({"content": "hi"}, "message 1 has no 'role'"),
        ({"role": 3, "content": "hi"}, "message 1 has no 'role'"),
        ({"role": "user"}, "message 1, of role 'user', has no 'content'"),
        ({"role": "user", "content": 3}, "message 1: 'content' is a text, or a list of parts"),
        ({"role": "user", "content": ["hi"]}, "message 1: 'content' is a text, or a list of parts"),
    ],
    ids=str,
)
def test_messages_are_looked_at_before_they_are_sent(llm: LLM, message: dict[str, Any], why: str) -> None:
    for ask in (llm.chat, llm.apply_chat_template, llm.chat_stream):
        with pytest.raises(superllama.PromptError, match=why):
            ask([{"role": "user", "content": "a"}, message])


def test_text_is_utf_8_wherever_it_stands(llm: LLM) -> None:
    for ask in (llm.chat, llm.tokenize, llm.apply_chat_template):
        with pytest.raises(superllama.PromptError, match="not UTF-8"):
            ask("\ud800")
    assert llm.tokenize("é") == llm.tokenize("\u00e9")
