"""The cache folder, and the `superllama cache` command over it."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from superllama import _cache, cli


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SUPERLLAMA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def filled(cache: Path) -> Path:
    (cache / "upstream" / "0123456789ab" / "src").mkdir(parents=True)
    (cache / "upstream" / "0123456789ab" / "src" / "a.cpp").write_bytes(bytes(100))
    (cache / "upstream" / "0123456789ab" / "b").write_bytes(bytes(20))
    (cache / "models").mkdir()
    (cache / "models" / "x.gguf").write_bytes(bytes(3000))
    (cache / "other").write_text("not ours")
    return cache


def test_the_variable_names_the_folder(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _cache.cache_dir() == cache
    monkeypatch.delenv("SUPERLLAMA_CACHE")
    assert _cache.cache_dir().name == "superllama"


def test_an_empty_cache(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _cache.entries() == []
    assert cli.main(["cache", "list"]) == 0
    assert "nothing kept" in capsys.readouterr().out
    assert not cache.exists()


def test_entries_and_sizes(filled: Path) -> None:
    assert [(e.name, e.size_bytes) for e in _cache.entries()] == [
        ("upstream/0123456789ab", 120),
        ("models/x.gguf", 3000),
    ]


def test_links_are_not_followed(filled: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_bytes(bytes(10_000))
    (filled / "models" / "link").symlink_to(outside)
    assert {e.name: e.size_bytes for e in _cache.entries()}["models/link"] < 10_000
    _cache.remove(_cache.chosen(["models/link"]))
    assert (outside / "keep").exists()
    assert not (filled / "models" / "link").exists()


@pytest.mark.parametrize(
    ("names", "left"),
    [
        ([], []),
        (["models"], ["upstream/0123456789ab"]),
        (["upstream/0123456789ab"], ["models/x.gguf"]),
        (["models/x.gguf", "upstream"], []),
    ],
)
def test_prune(filled: Path, names: list[str], left: list[str]) -> None:
    _cache.remove(_cache.chosen(names))
    assert [e.name for e in _cache.entries()] == left
    assert (filled / "other").read_text() == "not ours"


def test_an_unknown_name_removes_nothing(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", "prune", "models", "models/y.gguf"]) == 2
    assert "models/y.gguf" in capsys.readouterr().err
    assert len(_cache.entries()) == 2


def test_json(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["folder"] == str(filled)
    assert [e["size_bytes"] for e in listed["entries"]] == [120, 3000]
    assert cli.main(["cache", "prune", "models", "--json", "--yes"]) == 0
    assert [e["name"] for e in json.loads(capsys.readouterr().out)["entries"]] == ["models/x.gguf"]


@pytest.fixture
def repacked(filled: Path) -> Path:
    """Three files of repacked blocks, of 1, 2 and 3 kB, last used 1, 20 and 300 days ago."""
    folder = filled / "repacked"
    folder.mkdir()
    for i, days in enumerate((1, 20, 300), 1):
        file = folder / f"{i}.blocks"
        file.write_bytes(bytes(1000 * i))
        when = time.time() - days * 86400
        os.utime(file, (when, when))
    return folder


def left(kind: str = "repacked") -> list[str]:
    return [e.path.name for e in _cache.entries() if e.kind == kind]


def test_repacked_blocks_are_listed(repacked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", "list"]) == 0
    out = capsys.readouterr().out
    assert "repacked/2.blocks" in out
    assert "2.0 kB" in out


def test_prune_by_kind(repacked: Path) -> None:
    assert cli.main(["cache", "prune", "repacked", "--yes"]) == 0
    assert left() == []
    assert left("models") == ["x.gguf"]
    assert cli.main(["cache", "prune", "repacked", "--yes"]) == 0  # a kind may be empty


def test_prune_by_age(repacked: Path) -> None:
    assert cli.main(["cache", "prune", "--older-than", "10", "-y"]) == 0
    assert left() == ["1.blocks"]
    assert left("models") == ["x.gguf"]


def test_prune_by_size_keeps_what_was_used_last(repacked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", "prune", "repacked", "--max-size", "3500", "--json", "--yes"]) == 0
    assert [e["name"] for e in json.loads(capsys.readouterr().out)["entries"]] == ["repacked/3.blocks"]
    assert left() == ["1.blocks", "2.blocks"]


@pytest.mark.parametrize("size", ["lots", "auto", "10%", "0"])
def test_a_wrong_size_removes_nothing(repacked: Path, size: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", "prune", "--max-size", size]) == 2
    assert f"--max-size {size}" in capsys.readouterr().err
    assert len(left()) == 3


# ---------------------------------------------------------------- nothing goes unasked


def answering(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))

    def asked(_: str) -> str:
        if answer == "^D":
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", asked)


@pytest.mark.parametrize(
    ("answer", "code", "n_left"), [("y", 0, 0), ("YES", 0, 0), ("n", 1, 3), ("", 1, 3), ("^D", 1, 3)]
)
def test_prune_asks(
    repacked: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    answer: str,
    code: int,
    n_left: int,
) -> None:
    answering(monkeypatch, answer)
    assert cli.main(["cache", "prune", "repacked"]) == code
    assert len(left()) == n_left
    out = capsys.readouterr().out
    assert "to be removed in" in out  # what it asked about was shown
    assert ("nothing was removed" in out) == (n_left == 3)


def test_where_nobody_can_be_asked_nothing_is_removed(
    repacked: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for stdin in (SimpleNamespace(isatty=lambda: False), None):
        monkeypatch.setattr("sys.stdin", stdin)
        for more in ([], ["--json"]):
            assert cli.main(["cache", "prune", "repacked", *more]) == 2
            assert "--yes" in capsys.readouterr().err
    assert len(left()) == 3


def test_a_dry_run_removes_nothing_and_asks_nothing(repacked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["cache", "prune", "--dry-run", "--older-than", "10"]) == 0
    assert "repacked/2.blocks" in capsys.readouterr().out
    assert cli.main(["cache", "prune", "repacked", "--dry-run", "--json", "--yes"]) == 0
    assert len(json.loads(capsys.readouterr().out)["entries"]) == 3
    assert len(left()) == 3


# ---------------------------------------------------------------- homes

XDG = pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="the XDG base directories")
VARIABLES = ("HOME", "XDG_CACHE_HOME", "SUPERLLAMA_CACHE")


@XDG
@pytest.mark.parametrize(
    ("environment", "folder"),
    [
        ({"HOME": "/h"}, "/h/.cache/superllama"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/superllama"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "x"}, "/h/.cache/superllama"),
        ({"HOME": "/h", "XDG_CACHE_HOME": ""}, "/h/.cache/superllama"),
        ({"HOME": "/h", "SUPERLLAMA_CACHE": "~/c"}, "/h/c"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/superllama"),
    ],
)
def test_the_folder_does_not_depend_on_where_one_is(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], folder: str
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(_cache.cache_dirs()[0]) == folder


@XDG
def test_without_any_home_nothing_lands_where_one_happens_to_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["nobody"])
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert _cache.cache_dir() == tmp_path / f"superllama-{os.geteuid()}"
