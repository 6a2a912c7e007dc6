"""`superllama top`: look, draw, hear keys, again and again. What is drawn is made elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console

from .._errors import Error
from .._look.amounts import memory
from .._look.status import state_of
from .rates import History, Sample
from .sources import Action, Source
from .view import Picture

if TYPE_CHECKING:
    from .terminal import Terminal

T = TypeVar("T")

INTERVAL_S = 1.0  # between two looks
POLL_S = 0.1  # until an answer is seen


def top(source: Source) -> int:
    """Until q, or once where nobody sees it live; returns the exit code."""
    console = Console()
    if sys.platform == "win32" or not sys.stdout.isatty() or console.is_dumb_terminal:
        return _once(source, console)
    from .terminal import Terminal

    session = Session(source)
    with Terminal(console) as terminal:
        session.run(terminal)
    session.finish()
    return 0


def _once(source: Source, console: Console) -> int:
    """One picture, with the two samples that a rate needs."""
    watch = Watch(source)
    watch.take(source.read())
    if watch.found is None:
        raise Error(f"{source.name}: {source.nothing}")
    if len(watch.history.samples()) < 2:
        time.sleep(INTERVAL_S)
        watch.take(source.read())
    console.print(watch.picture())
    return 0


def call(work: Callable[[], T]) -> Future[T]:
    """What comes of it in a thread of its own, for what may take a while; nobody waits for it at the end."""
    found: Future[T] = Future()

    def run() -> None:
        try:
            found.set_result(work())
        except BaseException as e:
            found.set_exception(e)

    threading.Thread(target=run, daemon=True, name="superllama top").start()
    return found


class Watch:
    """What was seen of a source."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.history = History()
        self.found: Mapping[str, Any] | None = None
        self.problem = ""
        self._look: Future[list[dict[str, Any]]] | None = None
        self._next_look = 0.0

    def look(self) -> bool:
        """Ask the source when it is time, and take its answer when that is there. Whether something changed."""
        if self._look is None:
            if time.monotonic() >= self._next_look:
                self._next_look = time.monotonic() + INTERVAL_S
                self._look = call(self.source.read)
            return False
        if not self._look.done():
            return False
        look, self._look = self._look, None
        try:
            self.take(look.result())
            self.problem = ""
        except Error as e:
            self.problem = f"{e}; trying again"
        return True

    def take(self, statuses: list[dict[str, Any]]) -> None:
        """Keep what a source told, the newest last. Raises: Error where that is of another version."""
        self._look = None  # one that is under way may tell of a time before
        for found in statuses:
            if metrics := found.get("metrics"):
                try:
                    self.history.add(Sample.of(metrics))
                except ValueError as e:
                    raise Error(f"{self.source.name}: {e}; is it another version of superllama?") from e
            self.found = found

    def picture(self) -> Picture:
        """What there is to show now."""
        source = self.source
        problem = self.problem or ("" if self.found else source.nothing)
        return Picture(source.name, self.history.samples(), self.found, source.age(), problem)


class Session:
    """What is shown of a source, and asked of it, on a terminal."""

    def __init__(self, source: Source) -> None:
        self.watch = Watch(source)
        self.message = ""
        self.keys = source.keys
        self.help = False
        self._asked: tuple[Action, Future[dict[str, Any]]] | None = None
        self._held: Picture | None = None

    def run(self, terminal: Terminal) -> None:
        """Until q."""
        if not terminal.hears_keys:
            self.keys = "Ctrl-C quit: standard input is no terminal, and no key is heard"
        due = 0.0  # what is old grows older without any news
        while True:
            news = self.watch.look() | self._hear_answer()
            if news or time.monotonic() >= due:
                terminal.draw(self.picture())
                due = time.monotonic() + INTERVAL_S
            for key in terminal.wait(POLL_S):
                if key in ("q", "Q", "quit"):
                    return
                self.press(key)
                due = 0.0

    def finish(self) -> None:
        """Wait for what was asked of a server, which happens anyway, and say what came of it."""
        if self._asked:
            print(f"{self.message} (Ctrl-C does not wait)", file=sys.stderr, flush=True)
            self._hear_answer(wait=True)
            print(self.message, file=sys.stderr)

    def picture(self) -> Picture:
        """What is shown now."""
        now = self._held or self.watch.picture()
        may_change = self.watch.source.may_change
        return replace(now, may_change=may_change, keys=self.keys, message=self.message, help=self.help)

    def press(self, key: str) -> None:
        """Do what a key stands for; others do nothing."""
        if key == "?":
            self.help = not self.help
        elif key == " ":
            self._held = None if self._held else self.watch.picture()
            self.message = "held; space goes on" if self._held else ""
        else:
            self._ask(key)

    def _ask(self, key: str) -> None:
        try:
            action = self.watch.source.action(key, self.watch.found or {})
        except Error as e:
            self.message = str(e)
            return
        if action and self._asked:
            self.message = f"{action.said}: one at a time, {self._asked[0].said} is under way"
        elif action:
            self._asked = action, call(action.work)
            self.message = f"{action.said}: waiting for the answer"

    def _hear_answer(self, wait: bool = False) -> bool:
        if not self._asked or not (wait or self._asked[1].done()):
            return False
        (action, answer), self._asked = self._asked, None
        try:
            found = answer.result()
            self.watch.take([found])
            self.message = f"{action.said}: {_answer(found)}"
        except Error as e:
            self.message = str(e)
        return True


def _answer(found: Mapping[str, Any]) -> str:
    """What a change came to."""
    if not (metrics := found.get("metrics")):
        return state_of(found)
    used, budget = found["memory_used_bytes"], metrics["mem_budget_bytes"]
    later = "; what is too much goes when the batch at hand is done" if used > budget > 0 else ""
    return f"{state_of(found)}, {memory(used)} of {memory(budget)} in use{later}"
