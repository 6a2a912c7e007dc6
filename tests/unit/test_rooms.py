"""The rooms of src/: includes run downwards only, and no files include each other in a circle."""

from __future__ import annotations

import re
from pathlib import Path

SRC = Path(__file__).resolve().parents[2] / "src"

# A room may use those further down; devices and kv do not know each other.
ROOMS = ["engine", "server", "api", "context", "model", "devices", "kv", "weights", "io", "telemetry", "base"]
STRANGERS = {"devices", "kv"}


def includes(file: Path) -> list[str]:
    """Our own headers that `file` includes, relative to src/; those of upstream and include/ have no room."""
    names = re.findall(r'^#\s*include "([^"]+)"', file.read_text(), re.MULTILINE)
    return [name for name in names if name.split("/")[0] in ROOMS]


def test_every_file_is_in_a_room() -> None:
    files = [f for f in SRC.rglob("*") if f.is_file()]
    assert files
    assert {f.relative_to(SRC).parts[0] for f in files} == set(ROOMS)


def test_includes_run_downwards() -> None:
    for file in sorted(SRC.rglob("*.[ch]*")):
        room = file.relative_to(SRC).parts[0]
        for name in includes(file):
            used = name.split("/")[0]
            assert ROOMS.index(used) >= ROOMS.index(room), f"{file.relative_to(SRC)} includes {name}, which is above it"
            assert {room, used} != STRANGERS, f"{file.relative_to(SRC)} includes {name}: {room} does not know {used}"


def test_no_circle_of_files() -> None:
    graph = {f.relative_to(SRC).as_posix(): includes(f) for f in SRC.rglob("*.[ch]*")}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())
