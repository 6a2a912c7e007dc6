"""Long calls of the library that Ctrl-C shall reach.

Python hears signals in its main thread, between two of its own instructions. A call that takes a minute is none; and
where the library calls back into Python meanwhile, to log a line, KeyboardInterrupt would be raised inside the
callback, where nobody can catch it. So the main thread lets another one make the call, and waits where it can hear.
"""

from __future__ import annotations

import contextlib
import contextvars
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

from ._process import ending

T = TypeVar("T")

POLL_S = 0.5  # on systems where waiting for an event hears nothing


def in_main_thread() -> bool:
    """Whether this thread is the one that hears signals."""
    return threading.get_ident() == threading.main_thread().ident


def interruptible(
    work: Callable[[], T],
    stop: Callable[[], None] | None,
    undo: Callable[[T], None],
    within: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> T:
    """What `work` returns or raises. Ctrl-C meanwhile calls `stop`, waits for the end of the work, gives what came of
    it to `undo`, and is raised; another one does not wait any longer.

    `stop` is None where the library cannot be stopped. Ctrl-C is raised at once then, and the work ends by itself, and
    is undone, later: it may use nothing that the caller can change or free meanwhile. `within` is entered around the
    work and such an undoing, to hold what both need.

    From the main thread, `work` runs in a thread of its own; from any other, which hears no signals, in that one, and
    at the end of the interpreter in the main one.
    """

    def here() -> T:
        with within():
            return work()

    if not in_main_thread() or ending():
        return here()
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()
    lock = threading.Lock()  # between the caller's leaving and what the thread does next
    begun = left = False

    def run() -> None:
        nonlocal begun
        with lock:
            if left:  # Ctrl-C came before the thread did
                return
            begun = True
        try:
            with within():
                result = work()
                with lock:
                    if not left:
                        results.append(result)
                        return
                undo(result)
        except BaseException as e:
            errors.append(e)
        finally:
            done.set()

    thread = threading.Thread(target=contextvars.copy_context().run, args=(run,), daemon=True, name="superllama")
    try:
        try:
            thread.start()  # in which Ctrl-C may come too
        except RuntimeError:  # the system gives no more threads: a call without one is better than none
            return here()
        _wait(done)
    except BaseException:
        with lock:
            left = True
        if begun and stop is not None:
            stop()
            _wait(done)
        for result in results:
            with within():
                undo(result)
        raise
    if errors:
        raise errors[0]
    return results[0]


def _wait(done: threading.Event) -> None:
    while not done.wait(POLL_S):
        pass
