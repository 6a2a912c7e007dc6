"""Forms of answers as grammars and schemas, without a model."""

from __future__ import annotations

import enum
from typing import Any

import pytest
from pydantic import BaseModel

import superllama
from superllama._engine.formats import format_of
from superllama._engine.regex import choice_grammar, regex_grammar


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Llama(BaseModel):
    name: str
    age: int
    colour: Colour


@pytest.mark.parametrize(
    ("pattern", "grammar"),
    [
        ("abc", '"a" "b" "c"'),
        (r"\d{3}-\d+", '([0-9]){3,3} "-" ([0-9])+'),
        ("^(yes|no)$", '("y" "e" "s" | "n" "o")'),
        ("a?", '("a"){0,1}'),
        ("[^a-z\\]]*", r"([^a-z\]])*"),
        (r"\S+", r"([^ \t\n\r\x0B\x0C])+"),
        ('"\\\\', r'"\"" "\\"'),
        ("é", r'"\xE9"'),
        ("", '""'),
        ("(?:a|)b", '("a" | "") "b"'),
    ],
)
def test_regex_is_a_grammar(pattern: str, grammar: str) -> None:
    # Python makes a set of alternatives of one character, or takes what they have in common out of them
    found = regex_grammar(pattern)
    assert found.startswith("root ::= ")
    if pattern not in ("^(yes|no)$", "(?:a|)b"):
        assert found == f"root ::= {grammar}"


@pytest.mark.parametrize("pattern", ["(?=a)b", r"(a)\1", "(?i)a", "(?i:a)b", r"\bword", "a$b", "(unclosed", r"[\D1]"])
def test_what_a_grammar_cannot_hold_is_refused(pattern: str) -> None:
    with pytest.raises(superllama.GrammarError, match="regular expression"):
        regex_grammar(pattern)


def test_choices_are_texts() -> None:
    assert choice_grammar(["a", 'b"c']) == r'root ::= "a" | "b\"c"'
    for wrong in ([], ["a", ""], [1]):
        with pytest.raises(superllama.GrammarError):
            choice_grammar(wrong)  # type: ignore[arg-type]


def test_a_class_comes_back_as_an_instance() -> None:
    form = format_of(response_format=Llama)
    assert form.schema is not None and set(form.schema["required"]) == {"name", "age", "colour"}
    assert form.read('{"name": "Ada", "age": 3, "colour": "red"}') == Llama(name="Ada", age=3, colour=Colour.RED)
    with pytest.raises(superllama.GrammarError, match="cut"):
        form.read('{"name": "Ada", "ag')
    with pytest.raises(superllama.GrammarError, match="no text"):
        form.read('{"name": "\ufffd", "age": 3, "colour": "red"}')


@pytest.mark.parametrize(
    ("given", "schema"),
    [
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"schema": {"type": "integer"}}}, {"type": "integer"}),
        ({"type": "string", "maxLength": 3}, {"type": "string", "maxLength": 3}),
        (list[int], {"items": {"type": "integer"}, "type": "array"}),
    ],
)
def test_schemas(given: Any, schema: Any) -> None:
    assert format_of(response_format=given).schema == schema


def test_one_form_only_and_no_nonsense() -> None:
    with pytest.raises(superllama.GrammarError, match="response_format and regex"):
        format_of(response_format=Llama, regex="a")
    with pytest.raises(superllama.GrammarError, match="pydantic class"):
        format_of(response_format=object())
    with pytest.raises(superllama.GrammarError, match="GBNF"):
        format_of(grammar=" ")
