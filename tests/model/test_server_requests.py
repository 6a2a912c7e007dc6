"""What a request may hold: what the server cannot do is refused with a reason, and the server goes on."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import HttpServer, http_server

import superllama
from superllama._engine.formats import format_of
from superllama._programs import find_program

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    with http_server(tiny_model, tmp_path_factory.mktemp("server") / "log", "-np", 1, "-c", 512) as s:
        yield s


def chat(server: HttpServer, schema: object) -> tuple[int, Any]:
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    # one seed: upstream's parser of answers does not read some that are cut short inside a character
    body = {"messages": MESSAGES, "max_tokens": 4, "response_format": wrapped, "seed": 1}
    return server.request("/v1/chat/completions", body)


# ------------------------------------------------------------------------------------------------- depth


@pytest.mark.parametrize("depth", [30_000, 1_000_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_nested_json(server: HttpServer, depth: int, opening: str, closing: str) -> None:
    nested = opening * depth + "1" + closing * depth
    for path in ("/completion", "/v1/chat/completions", "/v1/messages", "/tokenize", "/apply-template"):
        assert "nested" in server.refused(path, f'{{"prompt": "a", "json_schema": {nested}}}'.encode())


def test_nested_json_in_a_string(server: HttpServer) -> None:
    """Arguments of a tool call are JSON in JSON."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "[" * 100_000 + "]" * 100_000}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    status, _ = server.request("/v1/chat/completions", {"messages": [*MESSAGES, message, *MESSAGES], "max_tokens": 1})
    assert status in (200, 400)
    assert server.process.poll() is None
    assert server.complete("a", n_predict=1)["content"] is not None


@pytest.mark.parametrize(
    "grammar",
    [
        "root ::= " + "(" * 30_000 + '"a"' + ")" * 30_000,
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(30_000)) + 'r30000 ::= "a"\n',
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(30_000)) + 'r30000 ::= r0 | "a"\n',
        "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}? r{i + 1}? \n" for i in range(60)) + 'r60 ::= "a"\n',
    ],
    ids=["parentheses", "chain", "left recursion", "exponential"],
)
def test_nested_grammar(server: HttpServer, grammar: str) -> None:
    assert "grammar" in server.refused("/completion", {"prompt": "a", "grammar": grammar})


@pytest.mark.parametrize(
    ("grammar", "why"),
    [
        ('root ::= "a" item\nitem = "b"', "line 2, column 6: expecting ::= at '= \"b\"'"),
        ('root ::= ("é" ', "line 1, column 15: expecting ')', and the grammar ends"),
        ('# a list\nroot ::= "a" ]', "line 2, column 14: expecting newline or end at ']'"),
        ("root ::= items", "it refers to a rule 'items', which it does not have"),
        ('start ::= "a"', "it has no rule 'root'"),
        ('root ::= root "a" | "a"', "left recursion"),
    ],
)
def test_why_a_grammar_cannot_be_used(server: HttpServer, grammar: str, why: str) -> None:
    for path, body in (("/completion", {"prompt": "a"}), ("/v1/chat/completions", {"messages": MESSAGES})):
        for stream in (False, True):
            said = server.refused(path, body | {"grammar": grammar, "stream": stream, "max_tokens": 2})
            assert why in said and "the grammar cannot be used: " in said
    with pytest.raises(superllama.GrammarError) as e:
        format_of(grammar=grammar)
    assert str(e.value) in said


def test_deep_grammars_that_are_not_too_deep(server: HttpServer) -> None:
    nested = "root ::= " + "(" * 400 + '"a"' + ")" * 400
    chain = "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(2000)) + 'r2000 ::= "a"\n'
    quoted = 'root ::= "' + "(" * 2000 + '" | [(((] # ' + "(" * 2000
    for grammar in (nested, chain):
        assert server.complete("a", grammar=grammar, n_predict=3)["content"] == "a"
    assert server.complete("a", grammar=quoted, n_predict=3)["content"].startswith("(")


@pytest.mark.parametrize("name", ["repeat_last_n", "dry_penalty_last_n"])
def test_window_of_a_sampler(server: HttpServer, name: str) -> None:
    body = {"prompt": "a", "repeat_penalty": 1.1, "dry_multiplier": 0.8, name: 2**31 - 1}
    assert name in server.refused("/completion", body)
    assert server.complete(**{**body, name: 4096}, n_predict=1)["content"] is not None


def test_long_keys(server: HttpServer) -> None:
    schema = {"type": "object", "properties": {"_" * 100_000: {"type": "string"}}}
    assert "key" in server.refused("/completion", {"prompt": "a", "json_schema": schema})


def test_tokens_that_there_are_not(server: HttpServer) -> None:
    for path, name in (("/tokenize", "content"), ("/detokenize", "tokens"), ("/completion", "prompt")):
        for token in (2**31, -1, 10**6):
            body = {name: [5, token], "with_pieces": True}
            assert "token" in server.refused(path, body).lower(), (path, token)


def test_numbers_that_are_no_counts(server: HttpServer) -> None:
    for top_n in (-2, 2**31, -3.5e38, 2**64):
        server.refused("/rerank", {"query": "a", "documents": ["a", "b"], "top_n": top_n})
    for token in (3.5e38, -1.0, 1e9, 2**64):
        assert "token" in server.refused("/detokenize", {"tokens": [5, token]})
    assert "typical_p" in server.refused("/completion", {"prompt": "a", "typical_p": -1})


@pytest.mark.parametrize("value", [2**40, -(2**31) - 1, 2**32, 2**63, 10**30], ids=str)
def test_numbers_that_would_be_cut(server: HttpServer, value: int) -> None:
    """Upstream reads integers into 32 bits; 2^40 was token 0."""
    assert str(value) in server.refused("/completion", {"prompt": [5, value], "n_predict": 1}) or value == 10**30
    for body in ({"prompt": "a", "n_predict": value}, {"prompt": "a", "top_k": value}, {"prompt": "a", "seed": value}):
        assert "out of range" in server.refused("/completion", body)
    assert server.request("/tokenize", {"content": [value]})[0] == 400
    assert server.complete("a", n_predict=1, seed=2**32 - 1)  # a seed has all 32


def test_two_forms_at_once(server: HttpServer) -> None:
    form = {"grammar": 'root ::= "a"', "json_schema": {"type": "object"}}
    message = [{"role": "user", "content": "a"}]
    for path, body in (("/v1/responses", {"input": "a"}), ("/v1/chat/completions", {"messages": message})):
        assert "not both" in server.refused(path, body | form)


def test_alternatives_of_an_empty_prompt_end(demo_model: Path, tmp_path: Path) -> None:
    """Those that waited for a prompt which there was nothing of waited for ever."""
    with http_server(demo_model, tmp_path / "log", "-np", 2, "-c", 512) as server:
        body = {"prompt": "", "n": 2, "n_predict": 4}
        status, answers = server.request("/completion", body, timeout=60)
        assert status == 200 and [answer["content"] for answer in answers] == ["", ""]
        events = server.stream("/completion", body | {"stream": True})
        assert [event["stop"] for event in events] == [True, True]
        assert server.complete("One, two,", n_predict=2)["tokens_predicted"] == 2


# ----------------------------------------------------------------------------------------------- schemas

HELD: list[Any] = [
    {"type": "string", "pattern": "^(a|b)+[0-9]{2,3}$"},
    {"type": "string", "pattern": "hello\\d?"},  # found anywhere
    {"type": "string", "pattern": '^[^"]"\\n.$'},  # escaped in the text
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "email"},  # an annotation
    {"type": ["integer", "null"], "minimum": 3, "maximum": 9, "description": "a number"},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3, "uniqueItems": False},
    {"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}, "required": ["a"], "$defs": {"x": {"enum": [1, 2]}}},
    {"anyOf": [{"type": "string"}, {"type": "null"}], "default": None, "title": "T"},
    {"oneOf": [{"const": 1}, {"const": "b"}], "type": ["integer", "string"]},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "null"}}}]},
    {"type": "object", "additionalProperties": {"type": "number"}},
    {"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}}},
]

DROPPED: list[tuple[Any, str]] = [
    ({"type": "string", "pattern": "^(?=a)a$"}, "pattern"),
    ({"type": "string", "pattern": "^[0-9]{2a}$"}, "pattern"),
    ({"type": "string", "pattern": "^[0-9]{,2}$"}, "pattern"),
    ({"type": "string", "pattern": "^a$", "maxLength": 3}, "maxLength"),
    ({"type": "string", "format": "date", "minLength": 3}, "minLength"),
    ({"type": "string", "maxLength": 5000}, "maxLength"),
    ({"type": "number", "minimum": 0}, "minimum"),
    ({"type": "integer", "multipleOf": 5}, "multipleOf"),
    ({"type": "integer", "minimum": 1, "exclusiveMinimum": 1}, "exclusiveMinimum"),
    ({"type": "array", "items": {"type": "integer"}, "uniqueItems": True}, "uniqueItems"),
    ({"type": "array", "prefixItems": [{"type": "integer"}], "minItems": 1}, "minItems"),
    ({"type": "array", "contains": {"const": 1}}, "contains"),
    ({"type": "object", "properties": {"a": {"type": "null"}}, "minProperties": 1}, "minProperties"),
    ({"type": "object", "patternProperties": {"^a": {"type": "null"}}}, "patternProperties"),
    ({"type": "object", "properties": {"a": {"type": "null"}}, "required": ["b"]}, '"b"'),
    ({"type": "string", "not": {"const": "a"}}, "not"),
    ({"type": "object", "properties": {"a": {"type": "null"}}, "if": {}, "then": {}}, "if"),
    ({"anyOf": [{"type": "string"}, {"type": "null"}], "minLength": 3}, "minLength"),
    ({"oneOf": [{"type": "string"}], "anyOf": [{"type": "string"}]}, "anyOf"),
    ({"$ref": "#/$defs/a", "minLength": 3, "$defs": {"a": {"type": "string"}}}, "minLength"),
    ({"enum": ["a", "bb"], "minLength": 2}, "minLength"),
    ({"allOf": [{"type": "string", "minLength": 3}]}, "allOf"),
    ({"allOf": [{"$ref": "#/$defs/a"}], "$defs": {"a": {"$ref": "#/$defs/a"}}}, "$ref"),
    ({"type": "object", "properties": {"a": {"properties": {"b": {"type": "number", "maximum": 1}}}}}, "properties/b"),
    ({"minimum": 3}, "minimum"),
    ({"type": "object", "properties": {"": {"type": "boolean"}, "a": {"type": "null"}}}, "no name"),
    (
        {
            "type": "object",
            "properties": {"a": {"$ref": "#/$defs/x y"}, "b": {"$ref": "#/$defs/x-y"}},
            "$defs": {"x y": {"type": "null"}, "x-y": {"type": "boolean"}},
        },
        "special characters",
    ),
]


@pytest.mark.parametrize("schema", HELD, ids=str)
def test_schemas_that_can_be_held(server: HttpServer, schema: Any) -> None:
    assert server.complete("a", json_schema=schema, n_predict=4)["content"] is not None
    status, answer = chat(server, schema)
    assert status == 200, answer


@pytest.mark.parametrize(("schema", "reason"), DROPPED, ids=str)
def test_schemas_that_cannot_be_held(server: HttpServer, schema: Any, reason: str) -> None:
    assert reason in server.refused("/completion", {"prompt": "a", "json_schema": schema})
    status, answer = chat(server, schema)
    assert status == 400, answer
    assert reason in answer["error"]["message"]


def test_schemas_that_stand_for_too_many(server: HttpServer) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(30):
        schema = {"type": ["object", "object"], "properties": {"a": schema}}  # each type is a schema of its own
    status, answer = chat(server, schema)
    assert status == 400
    assert "more than" in answer["error"]["message"]


def test_strict_tools_only(server: HttpServer) -> None:
    """A tool's schema is a description for the model, unless it says that it is more."""
    parameters = {"type": "object", "properties": {"a": {"type": "number", "minimum": 0}}}
    for strict, expected in ((False, 200), (True, 400)):
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": strict}}
        body = {"messages": MESSAGES, "max_tokens": 2, "tools": [tool], "tool_choice": "auto"}
        status, answer = server.request("/v1/chat/completions", body)
        assert status == expected, answer


# ----------------------------------------------------------------------------------------------- answers


FORM = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
# Where each API has the form of the answer, and where the answer is.
FORMS: dict[str, tuple[dict[str, Any], Callable[[Any], str]]] = {
    "/v1/completions": (
        {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": {"schema": FORM}}},
        lambda answer: str(answer["choices"][0]["text"]),
    ),
    "/v1/responses": (
        {"input": "x", "text": {"format": {"type": "json_schema", "name": "f", "schema": FORM}}},
        lambda answer: str(answer["output"][-1]["content"][0]["text"]),
    ),
    "/v1/messages": (
        {
            "messages": [{"role": "user", "content": "x"}],
            "output_config": {"format": {"type": "json_schema", "schema": FORM}},
        },
        lambda answer: str(answer["content"][-1]["text"]),
    ),
}


@pytest.mark.parametrize("path", FORMS)
def test_the_form_of_an_answer_holds_in_every_api(server: HttpServer, path: str) -> None:
    body, text = FORMS[path]
    limit = "max_output_tokens" if path == "/v1/responses" else "max_tokens"
    status, answer = server.request(path, {**body, limit: 200, "seed": 1})
    assert status == 200, answer
    assert json.loads(text(answer))["a"] in (1, 2)


@pytest.mark.parametrize("path", FORMS)
def test_a_form_that_there_is_not_is_refused(server: HttpServer, path: str) -> None:
    body = json.loads(json.dumps(FORMS[path][0]).replace('"json_schema", "', '"xml", "'))
    assert "xml" in server.refused(path, body)


def test_probabilities_of_an_answer_that_ends_inside_a_character(server: HttpServer) -> None:
    grammar = 'root ::= "😀é😀"'
    for n_predict in range(1, 11):
        answer = server.complete("a", grammar=grammar, n_predict=n_predict, n_probs=2)
        found = bytes(b for token in answer["completion_probabilities"] for b in token["bytes"])
        assert found == "😀é😀".encode()[:n_predict]
    answer = server.complete("a", grammar=grammar, n_predict=10, n_probs=2, stop=["é"])
    assert answer["content"] == "😀"
    assert bytes(b for token in answer["completion_probabilities"] for b in token["bytes"]) == "😀".encode()


@pytest.mark.parametrize("n_tokens", range(1, 5))
def test_a_stream_that_ends_inside_a_character_has_its_probabilities(server: HttpServer, n_tokens: int) -> None:
    """Half a character is no text, but its tokens have their probabilities, with all bytes of it so far."""
    body = {"messages": MESSAGES, "grammar": 'root ::= "😀"', "max_tokens": n_tokens, "logprobs": True, "stream": True}
    lines = server.stream("/v1/chat/completions", body)
    found = [choice["logprobs"]["content"] for line in lines for choice in line["choices"] if choice.get("logprobs")]
    assert bytes(found[-1][-1]["bytes"]) == "😀".encode()[:n_tokens]


@pytest.mark.parametrize("grammar", ['root ::= "a', "root ::= " + "(" * 30000 + '"a"' + ")" * 30000])
def test_a_bad_grammar_ends_a_program_with_a_reason(tiny_model: Path, tmp_path: Path, grammar: str) -> None:
    file = tmp_path / "bad.gbnf"
    file.write_text(grammar)
    command = [
        find_program("llama-completion"),
        "-m",
        tiny_model,
        "-no-cnv",
        "-p",
        "x",
        "-n",
        "2",
        "--grammar-file",
        file,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr[-500:]
    assert "grammar" in done.stderr
