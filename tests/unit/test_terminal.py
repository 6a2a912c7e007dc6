"""The terminal of `superllama top` is afterwards what it was before, however the program ends, or stops."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from statuses import append, line
from terminal import CURSOR, FIRST_SCREEN, NO_CURSOR, SCREEN, Terminal, under_terminal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX terminals")

TOP = [sys.executable, "-m", "superllama", "top", "--metrics"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    found = tmp_path / "m.jsonl"
    found.write_text(line(1) + line(2, generated_tokens=7))
    return found


@pytest.fixture
def top(path: Path) -> Iterator[Terminal]:
    with under_terminal([*TOP, path]) as terminal:
        terminal.wait_for("q quit")
        assert terminal.modes() != terminal.before
        assert SCREEN in terminal.text and NO_CURSOR in terminal.text
        yield terminal
        assert terminal.modes() == terminal.before
        assert terminal.text.rindex(FIRST_SCREEN) > terminal.text.rindex(SCREEN)
        assert terminal.text.rindex(CURSOR) > terminal.text.rindex(NO_CURSOR)


@pytest.mark.parametrize("key", ["q", "\x03"], ids=["q", "Ctrl-C"])
def test_keys_that_leave(top: Terminal, key: str) -> None:
    top.press(key)
    assert top.end() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_that_end_it(top: Terminal, number: int) -> None:
    os.kill(top.process.pid, number)
    assert top.end() == 128 + number


def test_an_error_of_its_own(path: Path) -> None:
    script = """
import sys
from superllama import cli
from superllama._top import loop as _top
def broken(self): raise RuntimeError("broken on purpose")
_top.Session.picture = broken
sys.exit(cli.main(sys.argv[1:]))
"""
    with under_terminal([sys.executable, "-c", script, *TOP[3:], path]) as terminal:
        assert terminal.end() == 1
        assert terminal.modes() == terminal.before
        assert terminal.text.index(FIRST_SCREEN) < terminal.text.index("broken on purpose")


def test_the_picture_follows_the_file_and_the_size_of_the_terminal(top: Terminal, path: Path) -> None:
    append(path, line(4, generated_tokens=107, event="final"))
    assert len(top.wait_for("max 50").splitlines()) == 24
    top.resize(60, 18)
    while len(found := top.picture().splitlines()) != 18:
        assert top.read()
    assert max(map(len, found)) <= 60
    top.press("?")
    top.wait_for("a router chose")
    top.press("\x1b[A?")
    top.press("? ")
    top.wait_for("held; space goes on")
    top.press("q")
    assert top.end() == 0


@pytest.mark.skipif(shutil.which("bash") is None, reason="a shell with jobs")
def test_ctrl_z_gives_the_terminal_to_the_shell(path: Path) -> None:
    script = 'set -m; "$@"; echo "stopped $?"; read line; fg >/dev/null; echo "left $?"'
    with under_terminal(["bash", "-c", script, "bash", *TOP, path]) as terminal:
        terminal.wait_for("q quit")
        terminal.press("\x1a")
        terminal.wait_for_output("stopped 148")
        assert terminal.modes() == terminal.before
        assert terminal.text.rindex(FIRST_SCREEN) > terminal.text.rindex(SCREEN)
        terminal.text = ""
        terminal.press("\n")
        terminal.wait_for("q quit")
        assert SCREEN in terminal.text and terminal.modes() != terminal.before
        terminal.press("q")
        terminal.wait_for_output("left 0")
        assert terminal.end() == 0
        assert terminal.modes() == terminal.before
