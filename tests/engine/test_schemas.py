"""Random JSON schemas: what comes back has the form that was asked for, or the request is refused."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import superllama

SCHEMAS = 200
PATTERNS = [
    *(
        "^[a-c]{2,4}$",
        "^x-[0-9]{1,3}y$",
        "^(yes|no)$",
        "^a?b?c{1,3}$",
        r"^\d{1,3}\.\d{2}$",
        r"^\w{1,5}@\w{2,3}$",
        r"^[^a]{3}$",
    ),
    *(
        "^.{2,4}$",
        '^"[^"]{1,3}"$',
        r"^\\{2}$",
        r"^\n?\t$",
        r"^\s{2}\S$",
        r"^\W\D$",
        "^[\x01-\x1f]{2}$",
        "^(a|b|)(?:c|d)$",
    ),
]
NOT_HELD: list[dict[str, Any]] = [
    {"multipleOf": 3},
    {"uniqueItems": True},
    {"not": {"type": "string"}},
    {"if": {"type": "string"}, "then": {"minLength": 2}},
    {"dependentRequired": {"a": ["b"]}},
    {"propertyNames": {"pattern": "^a"}},
    {"contains": {"type": "string"}},
]


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Values of it are short: a random model would go on with a string for ever."""
    kinds = ["string", "integer", "number", "boolean", "null", "enum", "const", "pattern"]
    kind = rng.choice(kinds if depth > 2 else [*kinds, "array", "object", "object", "anyOf", "ref"])
    if kind == "string":
        least = rng.randrange(3)
        return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(1, 6)}
    if kind == "integer":
        least = rng.randrange(-200, 200)
        return {"type": "integer", "minimum": least, "maximum": least + rng.randrange(300)}
    if kind == "enum":
        return {"enum": rng.sample(["a", "b\n", 'q"', 1, 2.5, None, True, ["x"], {"k": 1}], rng.randrange(1, 5))}
    if kind == "const":
        return {"const": rng.choice(["fixed", 7, {"a": [1, None]}, "ü\\"])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(PATTERNS)}
    if kind == "array":
        least = rng.randrange(3)
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": least, "maxItems": least + rng.randrange(3)}
    if kind == "object":
        names = rng.sample(["name", "age", 'a "b"', "ä", "x-y", "$z", ""], rng.randrange(1, 4))
        required = [name for name in names if rng.random() < 0.6]
        properties = {name: random_schema(rng, depth + 1) for name in names}
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(rng.randrange(1, 4))]}
    if kind == "ref":
        return {
            "$defs": {"one": random_schema(rng, 3)},
            "type": "array",
            "items": {"$ref": "#/$defs/one"},
            "maxItems": 2,
        }
    return {"type": kind}


@pytest.fixture(scope="module")
def several(tiny_model: Path) -> Any:
    with superllama.LLM(tiny_model, n_ctx=8192, n_parallel=8, n_threads=1) as llm:
        yield llm


def test_answers_have_the_form_that_was_asked_for(several: superllama.LLM) -> None:
    rng = random.Random(20)
    held = 0
    for k in range(SCHEMAS):
        schema = random_schema(rng)
        wraps = "$defs" in schema or rng.random() < 0.5  # references are found from the schema's root
        schema = schema if wraps else {"type": "object", "properties": {"v": schema}, "required": ["v"]}
        if "$defs" not in str(schema) or "$defs" in schema:
            try:
                # a token that stands for no text is text to a grammar (docs/limits.md)
                answer = several.generate(
                    "the", response_format=schema, max_tokens=400, seed=k, logit_bias={0: -math.inf, 1: -math.inf}
                )
            except superllama.GrammarError as e:
                assert any(why in str(e) for why in ("max_tokens", "schema", "no text")), e
                continue
            jsonschema.validate(answer.parsed, schema)
            held += 1
    assert held > 0.6 * SCHEMAS


@pytest.mark.parametrize("keyword", NOT_HELD, ids=lambda k: next(iter(k)))
def test_what_a_grammar_cannot_hold_is_refused(several: superllama.LLM, keyword: dict[str, Any]) -> None:
    for schema in (keyword, {"type": "object", "properties": {"a": keyword}, "required": ["a"]}):
        with pytest.raises(superllama.GrammarError):
            several.generate("the", response_format=schema, max_tokens=50)
