"""Every field in the API reference says what it is."""

from __future__ import annotations

import ast
import importlib
import inspect
import io
import re
import tokenize
from pathlib import Path
from typing import Any

import pytest

API = Path(__file__).parents[2] / "docs/api"
NAMES = [
    name for page in sorted(API.glob("*.md")) for name in re.findall(r"^::: (\S+)", page.read_text(), re.MULTILINE)
]


def named(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute, None)  # None: a module of the package


def silent_fields(kind: type) -> list[str]:
    """Fields without a comment on their lines, and without a description."""
    source = inspect.getsource(kind)
    commented = {
        token.start[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and not token.line.strip().startswith("#")
    }
    body = ast.parse(source).body[0]
    assert isinstance(body, ast.ClassDef)
    fields = [part for part in body.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)]
    return [
        ast.unparse(field.target)
        for field in fields
        if not ast.unparse(field.target).startswith("_")
        and "description=" not in ast.unparse(field)
        and commented.isdisjoint(range(field.lineno, (field.end_lineno or field.lineno) + 1))
    ]


@pytest.mark.parametrize("name", [name for name in NAMES if inspect.isclass(named(name))])
def test_a_field_has_a_text(name: str) -> None:
    assert silent_fields(named(name)) == []


def test_the_reference_is_of_classes_with_fields() -> None:
    assert len(NAMES) > 40 and silent_fields(Silent) == ["one"]


class Silent:
    one: int
    two: int  # is said
