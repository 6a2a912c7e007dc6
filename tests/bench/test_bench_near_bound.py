"""near_bound.py holds each turn against what the machine gave just before and after it."""

from types import SimpleNamespace

import pytest
from bench import near_bound


class Turns:
    """A program whose turns have these speeds."""

    def __init__(self, *speeds: float) -> None:
        self.speeds = iter(speeds)
        self.seen: list[dict[str, float]] = []

    def turn(self) -> None:
        self.seen.append({"decode": next(self.speeds)})


@pytest.mark.parametrize(
    ("speeds", "reached"), [((400, 600, 2400), [0.9, 0.9]), ((9000, 9000, 9000), [0.45 / 3, 1.35 / 5])]
)
def test_a_turn_has_its_own_bound(monkeypatch: pytest.MonkeyPatch, speeds: tuple, reached: list[float]) -> None:
    """1000 bytes are missing: a slow disk bounds, beside a fast one it is computing; both get faster all the time."""
    disk = iter(speeds)
    monkeypatch.setattr(near_bound.disk_speed, "measure", lambda *_, **__: SimpleNamespace(bytes_per_s=next(disk)))
    turns = list(near_bound.take_turns(Turns(0.45, 1.35), Turns(2, 4, 6), "file", 1100, 2))
    assert [t.reached(100) for t in turns] == pytest.approx(reached)


def test_a_row_shows_both_shares() -> None:
    turns = [near_bound.Turn(0.8, near_bound.bound.Limits(1100, 0, 1000.0, 5.0))] * 3
    cells = near_bound.row(10, 100, turns, 900, True).split(" | ")
    assert cells[4:7] == ["0.80 tok/s", "1.00, 0.80 (0.80-0.80)", "1.25, 0.64 (0.64-0.64)"]
