"""A metrics file is followed as it grows, whatever happens to it meanwhile; and `superllama top` of one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from statuses import append, line

from superllama import Error, cli
from superllama._top import growing_file as _growing_file
from superllama._top.growing_file import GrowingFile
from superllama._top.loop import Session
from superllama._top.sources import File


def tokens(file: GrowingFile) -> list[int]:
    return [found["token"] for found in file.lines()]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "m.jsonl"


def test_lines_come_as_they_are_written(path: Path) -> None:
    path.write_text(line(1) + line(2))
    file = GrowingFile(path)
    assert tokens(file) == [1, 2]
    assert tokens(file) == []
    append(path, line(3))
    assert tokens(file) == [3]


def test_half_a_line_waits_for_its_other_half(path: Path) -> None:
    file = GrowingFile(path)
    path.write_text(line(1) + line(2)[:30])
    assert tokens(file) == [1]
    append(path, line(2)[30:60])
    assert tokens(file) == []
    append(path, line(2)[60:] + line(3)[:5])
    assert tokens(file) == [2]


def test_a_file_that_was_truncated_is_read_from_its_beginning(path: Path) -> None:
    file = GrowingFile(path)
    path.write_text(line(1) + line(2) + line(3)[:20])
    assert tokens(file) == [1, 2]
    path.write_text("")
    assert tokens(file) == []
    append(path, line(4))
    assert tokens(file) == [4]
    path.write_text(line(5)[:-10])
    assert tokens(file) == []
    append(path, line(5)[-10:])
    assert tokens(file) == [5]


def test_a_file_that_takes_its_name_is_read(path: Path) -> None:
    file = GrowingFile(path)
    path.write_text(line(1) + line(2))
    assert tokens(file) == [1, 2]
    path.rename(path.with_name("old"))
    with pytest.raises(Error, match="no metrics can be read: No such file"):
        file.lines()
    path.write_text(line(3) * 3)
    assert tokens(file) == [3, 3, 3]


def test_of_a_long_file_only_the_end_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_growing_file, "TAIL", 3 * len(line(10)) + 7)
    path.write_text("".join(line(i) for i in range(10, 100)))
    assert tokens(GrowingFile(path)) == [97, 98, 99]


def test_a_log_with_metrics_among_its_lines(path: Path) -> None:
    path.write_text(
        "load: done\n[METRICS] " + line(1) + '\n{"a": 1}\n[1]\n' + line(2, stall_ms=None) + line(3) + "\xff\n"
    )
    assert tokens(GrowingFile(path)) == [1, 3]


def test_lines_of_an_earlier_version_are_shown(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    later = ("threads", "core_wait_ms", "throttled_ms", "experts", "sequences", "devices")
    later += ("expert_device_hits", "expert_device_misses", "expert_host_computed", "weight_bytes_ahead")
    later += ("expert_device_guesses", "expert_device_guesses_used")
    for text in (line(0), line(2, generated_tokens=20, event="final")):
        values = json.loads(text)
        append(path, json.dumps({name: value for name, value in values.items() if name not in later}) + "\n")
    assert cli.main(["top", "--metrics", str(path)]) == 0
    assert "max 10" in capsys.readouterr().out


def test_what_is_no_file_is_refused_at_once(path: Path) -> None:
    os.mkfifo(path)
    with pytest.raises(Error, match="FIFO"):
        GrowingFile(path).lines()


def test_a_file_is_shown_once_where_there_is_no_terminal(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--metrics", str(path)]) == 1
    assert "No such file" in capsys.readouterr().err
    path.write_text("load: done\n")
    assert cli.main(["top", "--metrics", str(path)]) == 1
    assert "no line of metrics so far" in capsys.readouterr().err
    path.write_text(line(0) + line(2, generated_tokens=20, event="final"))
    assert cli.main(["top", "--metrics", str(path)]) == 0
    text = capsys.readouterr().out
    assert str(path)[:20] in text and "ended" in text and "max 10" in text and "budget   p pause" not in text


def test_keys_of_a_file_change_nothing(path: Path) -> None:
    session = Session(File(path))
    for key in "+-p":
        session.press(key)
    assert session.message == "" and "budget" not in session.picture().keys
