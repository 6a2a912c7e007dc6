"""The package's modules depend on each other in one direction: whoever reads one can stop at what it imports."""

from __future__ import annotations

import ast
from pathlib import Path

import superllama

PACKAGE = Path(superllama.__file__).parent


def imported(file: Path) -> set[str]:
    """The modules of the package that this one names in an import, wherever it stands; with dots below a folder."""
    found: set[Path] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level > 0:
            folder = file.parents[node.level - 1]
            module = folder.joinpath(*node.module.split(".")) if node.module else folder
            found |= {module} | {module / alias.name for alias in node.names}
    return {name_of(path) for path in found if path.with_suffix(".py").exists()}


def name_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts)


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
    graph = {name_of(file): imported(file) for file in PACKAGE.rglob("*.py") if file.stem != "__init__"}
    assert len(graph) > 20
    assert "_errors" in graph["_engine.failures"] and "_engine.failures" in graph["_engine.handle"]
    assert circle(graph) == []


def test_a_circle_would_be_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []
