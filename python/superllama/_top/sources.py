"""What `superllama top` looks at: a server, which can be asked for changes too, or a metrics file."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import _control
from .._errors import Error
from .._look.amounts import memory
from .._look.status import state_of
from .growing_file import GrowingFile
from .rates import Sample

STEP = 0.1  # of the budget, for a key
PAUSED = ("pausing", "paused", "released")


@dataclass(frozen=True)
class Action:
    """What a key asks of a server."""

    said: str
    work: Callable[[], dict[str, Any]]


class Source:
    """Something that tells of a running model."""

    name: str
    may_change = False
    nothing = "no answer so far"
    keys = "q quit   space hold   ? help"

    def read(self) -> list[dict[str, Any]]:
        """What is new, as GET /superllama answers, the newest last. Raises: Error where nothing is to be had."""
        raise NotImplementedError

    def age(self) -> float:
        """Seconds since what was told last."""
        raise NotImplementedError

    def action(self, key: str, found: Mapping[str, Any]) -> Action | None:
        """What a key stands for, with what was found last; None if for nothing. Raises: Error if it cannot be."""
        return None


class Server(Source):
    """A server, over HTTP."""

    may_change = True
    keys = "q quit   + - budget   p pause/resume   space hold   ? help"

    def __init__(self, url: str, key: str | None, model: str | None = None) -> None:
        self.name = url if model is None else f"{model} at {url}"
        self.url, self._key, self._model = url, key, model
        self._told = time.monotonic()

    @property
    def _at(self) -> dict[str, Any]:
        return {"url": self.url, "key": self._key, "model": self._model}

    def read(self) -> list[dict[str, Any]]:
        """Its status now."""
        found = _control.status(**self._at)
        self._told = time.monotonic()
        return [found]

    def age(self) -> float:
        """Since it answered last, or was first asked."""
        return time.monotonic() - self._told

    def action(self, key: str, found: Mapping[str, Any]) -> Action | None:
        """Of + and -, another budget; of p, pause or resume."""
        if key in "+=":
            return self._budget(found, 1 + STEP)
        if key in "-_":
            return self._budget(found, 1 - STEP)
        if key == "p" and found.get("router"):
            raise Error("the models of a router are paused one by one: superllama top --model NAME")
        if key == "p" and state_of(found) in PAUSED:
            return Action("resume", lambda: _control.resume(**self._at))
        if key == "p":
            return Action("pause", lambda: _control.pause(**self._at))
        return None

    def _budget(self, found: Mapping[str, Any], factor: float) -> Action:
        metrics = found.get("metrics") or {}
        now = found["pool"]["total_bytes"] if found.get("router") else metrics.get("mem_budget_bytes")
        if not now:
            raise Error("there is no budget to change: " + ("no dynamic layers" if now == 0 else state_of(found)))
        wanted = round(now * factor)
        work = lambda: _control.set_budget(**self._at, budgets={"mem_budget": wanted})  # noqa: E731
        return Action(f"budget {memory(wanted)}", work)


class File(Source):
    """A file of metrics lines."""

    nothing = "no line of metrics so far; indented ones, by --metrics-pretty, are not read"

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._file = GrowingFile(path)
        self._newest = time.time()

    def read(self) -> list[dict[str, Any]]:
        """The lines that were written since the last call."""
        lines = self._file.lines()
        if lines:
            self._newest = Sample.of(lines[-1]).at
        return [{"metrics": line} for line in lines]

    def age(self) -> float:
        """Since the newest line was written."""
        return max(0.0, time.time() - self._newest)
