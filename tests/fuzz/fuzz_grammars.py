"""Grammars and JSON schemas that are broken at random: each is an error that gives a reason, or constrains an answer.

    python tests/fuzz/fuzz_grammars.py --minutes 60           # as long as that, from seed 1
    python tests/fuzz/fuzz_grammars.py --seed 7 --only 1234   # one case again

Grammars (GBNF) go to a Python context, schemas to a server. An answer that came to its end has to suit its schema.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonschema
import tiny_model as tiny
from json_mutations import dumped, mutated
from pydantic import ValidationError
from rounds import Isolated, Outcome, Say, command_line, generator
from served import Served, post
from serving import HttpServer

import superllama

GRAMMARS = (
    'root ::= "a"+',
    'root ::= [a-z]{2,5} (" " word)* "."\nword ::= [^ .\\n]+ | "\\x41" | "\\u00e9"',
    'root ::= (expr "=" term "\\n")+\nexpr ::= term ([-+*/] term)*\nterm ::= num | "(" expr ")"\nnum ::= [0-9]+ "."?',
    'root ::= object\nobject ::= "{" (pair ("," pair)*)? "}" # an object\npair ::= string ":" value\n'
    'string ::= "\\"" ([^"\\\\\\x7F\\x00-\\x1F] | "\\\\" ["\\\\/bfnrt])* "\\""\n'
    'value ::= object | string | [0-9]{1,16} | "true" | "false" | "null"',
    'root ::= <[5]> !<[6]> . [^\\U0001F600]? "😀"',
    "root ::= a b? c{0,3}\na ::= [abc] | a-1\na-1 ::= \"x\"\nb ::= a a\nc ::= b | \"\"",
)  # fmt: skip
PIECES = (
    "::=", "|", "(", ")", "*", "+", "?", "{2,3}", "{0,}", "{,3}", "{2000}", "{2001}", "{999}", "{1000000}", "{2,1}",
    "{-1}", "{0}", "{99999999999999999999}", "{", "}", "[", "]", "[^", "[]", "[^]", "[z-a]", "[a-", "-",
    "[\\x00-\\xFF]", "\\", '"', '""', "\\x4", "\\u12", "\\UFFFFFFFF", "\\U00110000", "\\ud800", '"\\', ".", "#", "\n",
    "\r\n", " ", "\t", "root", "root ::= ", "\nroot ::= ", "x", "_", "-a", "a b", "<", ">", "<[5]>", "<[303]>",
    "<[-1]>", "<[99999999999]>", "<s>", "<nothing>", "!<[5]>", "!", "é", "😀", "\ud800", "\0", "\x7f", "\ufeff", "0",
    "1e9", "a" * 3000, "(" * 600, "((" * 200 + "x" + "))" * 200, '("a"?)*' * 20, '("a"* "b"*)*', '(("a"*)*)*',
    "root root", '"a"{500}{500}', '("a"{100}){100}', "[a-z]{1,1999}",
)  # fmt: skip
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|\[(?:[^\]\\]|\\.)*\]|[\w-]+|::=|\{[^}]*\}|\s+|.', re.DOTALL)

SCHEMAS: tuple[Any, ...] = (
    {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", 1, None]}}, "required": ["a"],
     "additionalProperties": False},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    {"type": "array", "prefixItems": [{"type": "integer"}, {"type": "null"}]},
    {"type": "string", "pattern": "^(a|b)+[0-9]{2,3}$"},
    {"type": "string", "minLength": 2, "maxLength": 5},
    {"type": "string", "format": "date-time"},
    {"type": ["integer", "null"], "minimum": 3, "maximum": 900},
    {"type": "integer", "exclusiveMinimum": -7, "exclusiveMaximum": 12},
    {"anyOf": [{"type": "string"}, {"type": "null"}, {"const": [1, {"a": "b"}]}]},
    {"oneOf": [{"const": 1}, {"const": "b"}]},
    {"allOf": [{"type": "object", "properties": {"a": {"type": "null"}}}, {"properties": {"b": {"type": "number"}}}]},
    {"type": "object", "additionalProperties": {"type": "number"}},
    {"$ref": "#/$defs/node", "$defs": {"node": {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}}}},
    {"type": "object", "properties": {"a": {"$ref": "#/definitions/x"}}, "definitions": {"x": {"type": "boolean"}}},
)  # fmt: skip
BOUNDS = (0, 1, 2, 3, -1, -8, 7, 10, 99, 100, 1999, 2000, 2001, 10**6, 2**31, 2**63, 1.5, -0.5, 1e20)
TYPES: tuple[Any, ...] = (
    "string", "number", "integer", "boolean", "null", "array", "object", "x", [], ["string", "null"], ["object"] * 2,
)  # fmt: skip
PARTS: tuple[Any, ...] = ({}, True, False, {"type": "string"}, {"type": "integer", "minimum": 5}, {"enum": [1, "a"]})
KEYWORDS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "minLength",
                     "minItems", "maxLength", "maxItems", "minProperties", "maxProperties", "minContains"), BOUNDS),
    **dict.fromkeys(("items", "not", "additionalProperties", "contains", "if", "then", "propertyNames",
                     "additionalItems"), PARTS),
    **dict.fromkeys(("anyOf", "oneOf", "allOf", "prefixItems"), tuple([p, q] for p in PARTS for q in PARTS[:3])),
    **dict.fromkeys(("properties", "$defs", "definitions", "patternProperties"), tuple({"a": p} for p in PARTS)),
    "type": TYPES,
    "enum": ([], [1], ["a", "a"], [None, True, {"a": []}, "é", "\\", '"', "\n"], ["x" * 3000], list(range(300))),
    "const": (1, None, "a\"b", {"a": 1}, [], 1e300, "é", "\0", -0.0),
    "required": ([], ["a"], ["b"], ["a", "a"], [5]),
    "uniqueItems": (True, False),
    "format": ("date", "time", "date-time", "uuid", "uuid4", "uri", "x", 5),
    "pattern": ("^a$", "^(a|b)*$", "^[^a-z]+$", "^a{2,}$", "^(?:a)$", "^\\d+\\s$", "^.$", "^$", "a", "^(a$", "^[a",
                "^a{9999}$", "^(a*)*$", "^\\", "^[]$", "^a|b$", "^\\u0041$", "^é$", "^[\\w-]{3}$", "^(" + "(" * 300,
                "^" + "a?" * 300 + "$", "^a{3,1}$", "^*$", "^[z-a]$", "^\"$", "^a\\.b$", "^(a|)$", "^\\bx$", "^\n$"),
    "$ref": ("#", "#/$defs/a", "#/definitions/a", "#/properties/a", "#/x", "", "x", "#/$defs/node",
             "https://example.com/x", "#/anyOf/0"),
    "description": ("a",), "title": ("a",), "default": (1,), "nullable": (True,),
}  # fmt: skip


def grammar(rng: random.Random) -> tuple[str, str]:
    """A valid one with some changes."""
    text = rng.choice(GRAMMARS)
    tokens = TOKEN.findall(text)
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3, 6))):
        at = rng.randrange(len(tokens))
        kind = rng.randrange(7)
        if kind < 3:
            tokens[at : at + rng.randrange(2)] = [rng.choice(PIECES)]
        elif kind == 3:
            del tokens[at : at + rng.choice((1, 1, 3))]
        elif kind == 4:
            tokens[at:at] = tokens[at : at + rng.randrange(1, 9)] * rng.choice((1, 1, 3, 50))
        elif kind == 5:
            tokens[at] = rng.choice(TOKEN.findall(rng.choice(GRAMMARS)))
        else:
            letters, i = tokens[at], rng.randrange(len(tokens[at]))
            tokens[at] = letters[:i] + chr(rng.choice((rng.randrange(128), rng.randrange(0x3000)))) + letters[i + 1 :]
        tokens = tokens or ["x"]
    if rng.random() < 0.02:  # rules in a long row, or each of many of the one before
        n, body = rng.choice((100, 5000)), rng.choice(("r{}", "r{0} r{0}", "r{}?", '"a" r{}', "r{} | r{}"))
        tokens.append(
            "\n" + "\n".join(f"r{i} ::= {body.format(i + 1, i + 1)}" for i in range(n)) + f'\nr{n} ::= "a"\nroot ::= r0'
        )
    made = "".join(tokens)
    return made, repr(made)[:400]


class Grammars:
    def __init__(self, model: Path) -> None:
        self._context = superllama.Context(model, n_ctx=128, n_batch=32, n_ubatch=32, n_threads=1)
        self._expected = self._control()

    def _control(self) -> list[int | None]:
        return [piece.token for piece in self._context.generate("the", max_tokens=3, temperature=0)]

    def __call__(self, rng: random.Random, say: Say) -> tuple[str, str]:
        made, what = grammar(rng)
        say(what)
        try:
            options: dict[str, Any] = {"max_tokens": 12, "temperature": rng.choice((0, 1)), "seed": 1}
            list(self._context.generate("the", grammar=made, **options))
            answer = "ok", ""
        except (superllama.Error, ValidationError) as e:
            answer = ("refused" if str(e) and "no reason" not in str(e) else "refused without a reason"), str(e)
        if (found := self._control()) != self._expected:
            return "other tokens since", f"{found}"
        return answer


class Schemas:
    def __init__(self, seed: int, model: Path, folder: Path) -> None:
        self.seed = seed
        self._served = Served(folder, self._control, model, "-np", 1, "-c", 512, "--cache-ram", 0)

    @staticmethod
    def _control(server: HttpServer) -> object:
        return server.complete("the cat", n_predict=3, cache_prompt=False)["content"]

    def run(self, number: int) -> Outcome:
        rng = generator(self.seed, number)
        schema, note = mutated(rng, rng.choice(SCHEMAS), KEYWORDS, rng.choice((0, 1, 1, 2, 2, 3, 4)))
        ends = [['"', 4], ["}", 4], ["]", 4], [",", -2], ["\n", -9], ["\t", -9], [" ", -4], [0, False], [1, False]]
        options: dict[str, Any] = {"seed": number, "logit_bias": ends, "cache_prompt": False}
        as_chat = rng.random() < 0.3
        if as_chat:
            schema_of = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
            options |= {"messages": [{"role": "user", "content": "a"}], "max_tokens": 60, "response_format": schema_of}
        else:
            options |= {"prompt": "a", "n_predict": 60, "json_schema": schema}
        path = "/v1/chat/completions" if as_chat else "/completion"
        what = f"{path} {note}: {dumped(schema)[:400]!r}"
        outcome = self._served.ask(number, what, post(path, dumped(options)))
        if (
            outcome.verdict == "ok"
            and self._served.answer is not None
            and (wrong := self._unsuited(self._served.answer[1], schema))
        ):
            outcome.verdict, outcome.reason = "does not suit", wrong
        return outcome

    def _unsuited(self, body: bytes, schema: Any) -> str | None:
        """What is wrong with an answer that is complete."""
        answer = json.loads(body)
        if "choices" in answer:
            text, ended = answer["choices"][0]["message"]["content"], answer["choices"][0]["finish_reason"] == "stop"
        else:
            text, ended = answer["content"], answer["stop_type"] == "eos"
        if not ended or "\ufffd" in text:  # a random model writes bytes that are no character
            return None
        try:
            found = json.loads(text)
        except ValueError:
            return f"no JSON: {text!r}"
        try:
            plain = _as_read(json.loads(dumped(schema)))
            jsonschema.Draft202012Validator.check_schema(plain)
            jsonschema.Draft202012Validator(plain).validate(found)
        except jsonschema.ValidationError as e:
            return f"{text!r}: {e.message[:200]}"
        except Exception:  # it is no schema: a reference leads nowhere, a pattern is of another dialect
            return None
        return None

    def close(self) -> None:
        self._served.close()


def _as_read(schema: Any) -> Any:
    """What the library makes of a schema: oneOf is anyOf, as docs/limits.md says; a type beside it is not looked at."""
    if isinstance(schema, list):
        return [_as_read(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    chosen = {"oneOf", "anyOf", "const", "enum"} & set(schema)
    read = {key: part for key, part in schema.items() if key != "type" or not chosen}
    return {"anyOf" if key == "oneOf" else key: _as_read(part) for key, part in read.items()}


class Fuzzer:
    """Every second case is a schema."""

    def __init__(self, seed: int, folder: Path) -> None:
        model = tiny.write_llama(folder / "tiny.gguf")
        self._grammars = Isolated(seed, folder, Grammars, model)
        self._schemas = Schemas(seed, model, folder)

    def run(self, number: int) -> Outcome:
        return self._schemas.run(number) if number % 2 else self._grammars.run(number)

    def close(self) -> None:
        self._grammars.close()
        self._schemas.close()


if __name__ == "__main__":
    sys.exit(command_line(__doc__, Fuzzer))
