"""Memory of C that Python owns goes with the name that holds it: nothing uses a part of what nobody holds."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import superllama
from superllama._native import ffi, lib

PACKAGE = Path(superllama.__file__).parent


def owns(call: ast.expr) -> bool:
    """Whether what this makes goes as soon as nobody holds it: ffi.new(), and structs that the library returns."""
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute)):
        return False
    of, name = ast.unparse(call.func.value), call.func.attr
    return (of == "ffi" and name == "new") or (
        of == "lib" and ffi.typeof(getattr(lib, name)).result.kind in ("struct", "union")
    )


def parts_of_nothing(tree: ast.AST) -> Iterator[str]:
    """Parts of what nobody holds: they point to memory that is free."""
    for node in ast.walk(tree):
        whole = None
        if isinstance(node, ast.Attribute | ast.Subscript):
            whole = node.value
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "ffi.addressof":
            whole = node.args[0]
        if whole is not None and owns(whole):
            yield ast.unparse(node)


@pytest.mark.parametrize(
    "code, n",
    [
        ("out = ffi.new('struct superllama_model_params *').vram_budget_bytes", 1),
        ("out = lib.llama_model_default_params().superllama", 1),
        ("use(ffi.addressof(ffi.new('llama_batch *'), 'n_tokens'))", 1),
        ("given = ffi.new('uint64_t *')\nuse(given[0])\nuse(ffi.new('char[]', b''))", 0),
    ],
)
def test_what_is_looked_for(code: str, n: int) -> None:
    assert len(list(parts_of_nothing(ast.parse(code)))) == n


def test_nothing_is_used_that_nobody_holds() -> None:
    found = {path.name: list(parts_of_nothing(ast.parse(path.read_text()))) for path in sorted(PACKAGE.rglob("*.py"))}
    assert not {name: parts for name, parts in found.items() if parts}


@pytest.mark.parametrize("name", ["superllama_plan", "superllama_node_share", "superllama_plan_layer"])
def test_what_is_copied_field_by_field_has_numbers_only(name: str) -> None:
    kinds = {field: of.type.kind for field, of in ffi.typeof(f"struct {name}").fields}
    assert set(kinds.values()) <= {"primitive", "enum"}
