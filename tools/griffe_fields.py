"""Fields of classes that are data, as a table in the API reference; mkdocs.yml loads this.

Dataclasses, TypedDicts and pydantic models say what a field is in a comment at the end of its line, or in
Field(description=): the source is a table. A heading for each field would make a page of hundreds.
"""

from __future__ import annotations

import ast
import io
import tokenize
from typing import Any

import griffe

LIMITS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


class Fields(griffe.Extension):  # type: ignore[misc, unused-ignore] # griffe is there where documentation is built
    """Puts the table at the end of the class's docstring, in place of the fields."""

    def on_class_members(self, *, node: Any, cls: griffe.Class, **_: Any) -> None:
        """Called for each class that was read from source."""
        if not isinstance(node, ast.ClassDef):
            return
        rows = []
        for statement in node.body:
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                name = statement.target.id
                if not name.startswith("_") and (field := cls.members.pop(name, None)):
                    rows.append(_row(name, statement, field.lines))
        if not rows:
            return
        default = any(row[2] for row in rows)
        columns = ("name", "type", "default", "") if default else ("name", "type", "")
        cells = rows if default else [(name, kind, said) for name, kind, _, said in rows]
        table = ["| " + " | ".join(row) + " |" for row in (columns, ["---"] * len(columns), *cells)]
        said = cls.docstring.value if cls.docstring else ""
        cls.docstring = griffe.Docstring(said + "\n\n" + "\n".join(table), parent=cls)
        cls.decorators = []  # a dataclass without fields would be shown as one that is made of nothing
        cls.labels.discard("dataclass")


def _row(name: str, field: ast.AnnAssign, lines: list[str]) -> tuple[str, str, str, str]:
    kind, value = _without_limits(field.annotation), field.value
    said = _comment(lines)
    if isinstance(value, ast.Call):
        described = next((k.value for k in value.keywords if k.arg == "description"), None)
        said = described.value if isinstance(described, ast.Constant) else said
    for call in (part for part in ast.walk(field) if isinstance(part, ast.Call)):
        limits = [(LIMITS[k.arg], ast.unparse(k.value)) for k in call.keywords if k.arg in LIMITS]
        said += "".join(f"; {words} {number}" for words, number in limits if len(number) < 8)
    return f"`{name}`", _code(ast.unparse(kind)), _default(value), _cell(said.strip("; "))


def _without_limits(annotation: ast.expr) -> ast.expr:
    """int of Annotated[int, Field(...)]."""

    class Plain(ast.NodeTransformer):
        def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
            self.generic_visit(node)
            if ast.unparse(node.value) == "Annotated" and isinstance(node.slice, ast.Tuple):
                return node.slice.elts[0]
            return node

    found: ast.expr = Plain().visit(annotation)
    return found


def _default(value: ast.expr | None) -> str:
    """Where it stands there; the library's own are not known before it is loaded."""
    if isinstance(value, ast.Call) and ast.unparse(value.func) == "Field" and value.args:
        value = value.args[0]
    return "" if value is None or isinstance(value, ast.Call) else _code(ast.unparse(value))


def _cell(text: str) -> str:
    """Braces at the end of a cell would be its attributes."""
    return text.replace("|", r"\|").replace("{", "&#123;")


def _code(text: str) -> str:
    return f"`{text.replace(' | ', ' or ')}`"


def _comment(lines: list[str]) -> str:
    """The comment at the end of a field; parentheses hold a field of several lines together."""
    tokens = tokenize.generate_tokens(io.StringIO("\n".join(lines).strip() + "\n").readline)
    last = [token.string for token in tokens if token.type == tokenize.COMMENT][-1:]
    said = last[0].lstrip("# ") if last else ""
    return "" if said.startswith(("type:", "noqa")) else said
