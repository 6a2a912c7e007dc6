"""The package's modules depend on each other in one direction: whoever reads one can stop at what it imports."""

from __future__ import annotations

import ast
from pathlib import Path

import superllama

PACKAGE = Path(superllama.__file__).parent


def imported(file: Path) -> set[str]:
    """The modules of the package that this one names in an import, wherever it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level == 1:
            names |= {node.module} if node.module else {alias.name for alias in node.names}
    return {name for name in names if (PACKAGE / f"{name}.py").exists()}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in turn, the first one again at the end; empty if there are none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name not in done:
            for other in sorted(graph[name]):
                if found := visit(other, [*path, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Also not for types only, nor inside a function: the circle would be there to read."""
    graph = {file.stem: imported(file) for file in PACKAGE.glob("*.py") if file.stem != "__init__"}
    assert len(graph) > 20
    assert circle(graph) == []


def test_a_circle_would_be_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
