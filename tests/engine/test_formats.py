"""Forms of answers as grammars and schemas, without a model."""

from __future__ import annotations

import enum
import random
import re
from typing import Any

import pytest
from pydantic import BaseModel

import superllama
from superllama._engine.formats import format_of
from superllama._engine.regex import choice_grammar, matches, regex_grammar


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


PARTS = ["a", "b", "bb", ".", r"\d", r"\w", r"\s", r"\D", r"\S", r"\W", "[ab]", "[^a]", "[a-c1]", r"[\d_]", r"[^b\s]"]


def random_pattern(rng: random.Random, depth: int = 0) -> str:
    kind = rng.randrange(9 if depth < 3 else 3)
    if kind < 3:
        return rng.choice(PARTS)
    inner = random_pattern(rng, depth + 1)
    return {
        3: f"{inner}{random_pattern(rng, depth + 1)}",
        4: f"({inner}|{random_pattern(rng, depth + 1)}|)",
        5: f"(?:{inner})*",
        6: f"({inner})+?",
        7: f"(?:{inner})?",
        8: f"({inner}){{{rng.randrange(3)},{rng.randrange(2, 5)}}}",
    }[kind]


def test_a_pattern_matches_what_it_matches_in_python() -> None:
    rng = random.Random(1)
    matched = 0
    for _ in range(3000):
        pattern = random_pattern(rng)
        for _ in range(5):
            text = "".join(rng.choice("abc1_ \né") for _ in range(rng.randrange(7)))
            expected = re.fullmatch(pattern, text, re.ASCII) is not None
            assert matches(pattern, text) is expected, (pattern, text)
            matched += expected
    assert matched > 1000


def test_no_pattern_takes_for_ever() -> None:
    """Of these Python's own matcher tries every way in turn."""
    for pattern in ("(a+)+b", "(a|a)*b", "(a?){40}b", "(a?){2000000000}b"):
        assert not matches(pattern, "a" * 40) and matches(pattern, "a" * 40 + "b")


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
    ("form", "whole", "cut"),
    [
        ({"regex": "[0-9]{3}"}, "123", "12"),
        ({"choice": ["yes", "no"]}, "yes", "ye"),
        ({"response_format": int}, "12", "-"),
        ({"response_format": {"type": "object"}}, "{}", "{"),
    ],
    ids=str,
)
def test_an_answer_that_was_cut_is_an_error_for_every_form(form: dict[str, Any], whole: str, cut: str) -> None:
    found = format_of(**form)
    assert found.read(whole) in (whole, 12, {})
    with pytest.raises(superllama.GrammarError, match="does not have the form"):
        found.read(cut)


def test_of_a_grammar_only_the_engine_knows() -> None:
    assert format_of(grammar='root ::= "abc"').read("ab") is None


@pytest.mark.parametrize(
    ("form", "why"),
    [
        ({"grammar": 'root ::= root "a" | "a"'}, "left recursion"),
        ({"grammar": "root ::= foo"}, "refers to a rule 'foo'"),
        ({"grammar": 'root ::= "a'}, "unexpected end of input"),
        ({"grammar": 'other ::= "a"'}, "no rule 'root'"),
        ({"regex": "a?" * 200}, "more than 100 parts in a row"),
    ],
    ids=str,
)
def test_a_grammar_is_parsed_before_it_is_sent(form: dict[str, Any], why: str, capfd: Any) -> None:
    for _ in range(2):
        with pytest.raises(superllama.GrammarError, match=f"the grammar cannot be used: .*{why}"):
            format_of(**form)
    assert capfd.readouterr().err == ""


def test_what_needs_a_vocabulary_is_left_to_the_engine() -> None:
    assert format_of(grammar='root ::= <think> "a"').grammar == 'root ::= <think> "a"'


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
