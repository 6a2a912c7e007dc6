"""The load progress callback, and the bar that a terminal gets for loads that take a while."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from ._native import ffi, keep_error
from ._process import stop_at_exit

if TYPE_CHECKING:
    from rich.progress import Progress

# called with 0.0 to 1.0; False stops the load
ProgressCallback = Callable[[float], bool | None]

QUIET_S = 1.0  # shorter loads show nothing


class LoadProgress:
    """What llama_progress_callback calls for one load. An exception of the user's function stops the load
    and is kept in `error`, as Ctrl-C is."""

    def __init__(self, callback: ProgressCallback | None) -> None:
        self.callback = callback
        self.cancelled = False
        self.error: BaseException | None = None
        self.handle = ffi.new_handle(self)
        self._ended = threading.Event()
        self._ended.set()

    def cancel(self) -> None:
        """Stop the load when it asks next, from any thread."""
        self.cancelled = True

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """While the library loads: at the end of the interpreter it is stopped and waited for, since there must be no
        Python that it calls back into afterwards."""
        try:
            self._ended.clear()
            stop_at_exit(self)
            yield
        finally:
            self._ended.set()

    def _stop(self, seconds: float) -> bool:
        self.cancel()
        return self._ended.wait(seconds)

    def _abandon(self) -> None:
        pass  # there is nothing yet that could be freed

    def step(self, progress: float) -> bool:
        """Whether loading goes on."""
        if self.error is None and not self.cancelled and self.callback:
            try:
                if self.callback(progress) is False:
                    self.cancelled = True
            except BaseException as e:
                self.error = e
        return self.error is None and not self.cancelled


@ffi.def_extern(name="superllama_py_progress", error=False, onerror=keep_error)  # type: ignore[untyped-decorator]
def _on_progress(progress: float, user_data: Any) -> bool:
    load: LoadProgress = ffi.from_handle(user_data)
    return load.step(progress)


class LoadBar:
    """A progress callback that draws a rich bar on stderr, once QUIET_S have passed."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.start = time.monotonic()
        self.bar: Progress | None = None

    def __call__(self, progress: float) -> None:
        """Draw; called by the library with 0.0 to 1.0."""
        if self.bar is None:
            if time.monotonic() - self.start < QUIET_S:
                return
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
            self.bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self.bar.add_task(f"loading {self.name}", total=1.0)
            self.bar.start()
        self.bar.update(self.bar.task_ids[0], completed=progress)

    def close(self) -> None:
        """Remove the bar."""
        if self.bar is not None:
            self.bar.stop()


def bar_for(name: str) -> LoadBar | None:
    """A bar if stderr is a terminal."""
    return LoadBar(name) if sys.stderr is not None and sys.stderr.isatty() else None
