"""Long calls of the library that Ctrl-C shall reach.

Python hears signals in its main thread, between two of its own instructions. A call that takes a minute is none; and
where the library calls back into Python meanwhile, to log a line, KeyboardInterrupt would be raised inside the
callback, where nobody can catch it. So the main thread lets another one make the call, and waits where it can hear.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

POLL_S = 0.5  # on systems where waiting for an event hears nothing


def in_main_thread() -> bool:
    """Whether this thread is the one that hears signals."""
    return threading.get_ident() == threading.main_thread().ident


def interruptible(work: Callable[[], T], stop: Callable[[], None], undo: Callable[[T], None]) -> T:
    """What `work` returns or raises. Ctrl-C meanwhile calls `stop`, waits for the end of the work, gives what came of
    it to `undo`, and is raised; another one does not wait any longer.

    From the main thread, `work` runs in a thread of its own; from any other, which hears no signals, in that one.
    """
    if not in_main_thread():
        return work()
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()

    def run() -> None:
        try:
            results.append(work())
        except BaseException as e:
            errors.append(e)
        finally:
            done.set()

    try:
        threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True, name="superllama").start()
    except RuntimeError:  # the system gives no more threads: a call without one is better than none
        return work()
    try:
        _wait(done)
    except BaseException:
        stop()
        _wait(done)
        for result in results:
            undo(result)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _wait(done: threading.Event) -> None:
    while not done.wait(POLL_S):
        pass
