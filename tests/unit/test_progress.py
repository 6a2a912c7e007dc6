"""The bar of a load: on a terminal and for long loads only, and gone afterwards."""

from __future__ import annotations

import io
import sys

import pytest

from superllama import _progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_no_bar_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert _progress.bar_for("x.gguf") is None


@pytest.mark.parametrize(("quiet_s", "shown"), [(0.0, True), (1e9, False)])
def test_only_long_loads_get_a_bar(monkeypatch: pytest.MonkeyPatch, quiet_s: float, shown: bool) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(_progress, "QUIET_S", quiet_s)
    monkeypatch.setenv("TERM", "xterm-256color")
    bar = _progress.bar_for("x.gguf")
    assert bar is not None
    for share in (0.0, 0.5, 1.0):
        bar(share)
    bar.close()
    assert ("x.gguf" in terminal.getvalue()) == shown


def test_a_callback_that_returns_nothing_goes_on() -> None:
    load = _progress.LoadProgress(lambda share: None)
    assert load.step(0.5)
    load = _progress.LoadProgress(lambda share: share < 0.5)
    assert [load.step(share) for share in (0.4, 0.6, 0.4)] == [True, False, False]
    assert load.cancelled
