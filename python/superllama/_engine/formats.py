"""The form that an answer must have: a schema, a class, one of several texts, a regular expression, a grammar.

What cannot be held is an error before anything is generated. An answer that does not have its form, mostly for it was
cut, is one afterwards, for every form but a grammar: what that would hold only the engine knows, and `parsed` is None.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from .._errors import GrammarError
from .._grammar import check_grammar
from .regex import choice_grammar, matches, regex_grammar

REPLACEMENT = "\ufffd"  # what stands for bytes that are not UTF-8


@dataclasses.dataclass(frozen=True)
class Format:
    """How a request says it, and how the text becomes an object."""

    schema: Mapping[str, Any] | None = None
    grammar: str | None = None
    parse: Callable[[str], Any] | None = None

    def read(self, text: str) -> Any:
        """The object that an answer is, None for a grammar, and where no form was asked for. Raises: GrammarError if it
        is none."""
        if self.parse is None:
            return None
        if REPLACEMENT in text:  # a grammar counts characters, and what is none counts as it likes
            raise GrammarError(f"the answer holds bytes that are no text, where a form was asked for: {text:.200}")
        return self.parse(text)


def format_of(
    response_format: Any = None,
    choice: Sequence[str] | None = None,
    regex: str | None = None,
    grammar: str | None = None,
) -> Format:
    """The form that these ask for; at most one of them.

    `response_format` is a pydantic class, any other type that pydantic knows, a JSON schema, or OpenAI's
    {"type": "json_schema", "json_schema": {"schema": ...}} and {"type": "json_object"}.

    Raises: GrammarError for two forms, and for one that cannot be held.
    """
    forms = {"response_format": response_format, "choice": choice, "regex": regex, "grammar": grammar}
    given = [name for name, value in forms.items() if value is not None]
    if len(given) > 1:
        raise GrammarError(f"an answer can have one form, and {' and '.join(given)} are given")
    if choice is not None:
        choices = list(choice)
        return Format(grammar=choice_grammar(choices), parse=lambda text: _whole(text, text in choices))
    if regex is not None:
        pattern = regex_grammar(regex)
        check_grammar(pattern)
        return Format(grammar=pattern, parse=lambda text: _whole(text, matches(regex, text)))
    if grammar is not None:
        if not isinstance(grammar, str) or not grammar.strip():
            raise GrammarError("a grammar is a text in GBNF with a rule `root`")
        check_grammar(grammar)
        return Format(grammar=grammar)
    if response_format is None:
        return Format()
    if isinstance(response_format, Mapping):
        return Format(schema=_schema(response_format), parse=_json)
    return _of_type(response_format)


def _schema(given: Mapping[str, Any]) -> Mapping[str, Any]:
    kind = given.get("type")
    if kind == "json_object":
        return given.get("schema") or {"type": "object"}
    if kind == "json_schema":
        schema = given.get("json_schema", {})
        schema = schema.get("schema", schema) if isinstance(schema, Mapping) else schema
        if not isinstance(schema, Mapping):
            raise GrammarError("a response_format of type json_schema has a 'json_schema' with a 'schema'")
        return schema
    return given


def _of_type(kind: Any) -> Format:
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        model = kind
        return Format(model.model_json_schema(), parse=lambda text: _checked(model.model_validate_json, text))
    try:
        adapter: TypeAdapter[Any] = TypeAdapter(kind)
        schema = adapter.json_schema()
    except Exception as e:  # pydantic has several for what is no type
        raise GrammarError(f"response_format is a pydantic class, a type or a JSON schema, not {kind!r:.80}") from e
    return Format(schema, parse=lambda text: _checked(adapter.validate_json, text))


def _json(text: str) -> Any:
    return _checked(json.loads, text)


def _checked(parse: Callable[[str], Any], text: str) -> Any:
    try:
        return parse(text)
    except (ValidationError, ValueError) as e:
        raise _not_whole(text) from e


def _whole(text: str, is_whole: bool) -> str:
    if not is_whole:
        raise _not_whole(text)
    return text


def _not_whole(text: str) -> GrammarError:
    return GrammarError(
        f"the answer does not have the form that was asked for, perhaps for it was cut (max_tokens): {text:.200}"
    )
