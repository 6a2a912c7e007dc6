"""The process: what a fork may not use of its parent, and what has to stop before the interpreter ends.

A fork copies memory, but no threads. Readers, watchers and the team of compute threads are not there in the child, and
locks that they held are locked for ever: a call would wait for them without end. So every native object knows in which
process it was made, and in another one a use of it is an error, at once, and freeing it does nothing.

At the end of the interpreter, threads that are daemons may still be inside the library, on objects that are then freed.
So each object is told to stop, and its lock is taken and kept, before anything is freed. A load calls back into Python,
which would end its thread in the middle of the library once the interpreter has gone: it is known from before it begins
until it has ended, and what has not begun by then does not.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from typing import Protocol

from ._errors import ForkedError

EXIT_S = 10.0  # what is not still by then is left as it is: neither waited for any longer, nor freed


class Stoppable(Protocol):
    """A native object that a thread may be using when the interpreter ends."""

    def _stop(self, seconds: float) -> bool:
        """Make what uses it end, keep others from beginning; whether that is so after `seconds` at most."""

    def _abandon(self) -> None:
        """Never free it."""


_forks = 0  # how often this process and its ancestors forked, as far as they had loaded the package
_computed_in: int | None = None  # the process, this one or an ancestor, that computed first
_living: weakref.WeakSet[Stoppable] = weakref.WeakSet()
_ending = False
_gate = threading.RLock()  # at the end the main thread keeps it, and may go on itself: hooks run after ours


def this_process() -> int:
    """A number that is another one in a fork."""
    return _forks


def inherited(made_in: int) -> bool:
    """Whether what was made in the process of this number is a copy, left by a fork."""
    return made_in != _forks


def check_process(made_in: int, what: str) -> None:
    """Raises: ForkedError if `what` was made before a fork."""
    if inherited(made_in):
        raise ForkedError(
            f"{what} was made in the process that this one was forked from, and the threads that work for it stayed "
            "there; load the model in the process that uses it, or start processes with the method 'spawn'"
        )


def check_can_compute() -> None:
    """Raises: ForkedError in a fork of a process that has computed: the compute threads are the process's, not a
    context's, and a context of its own would wait for threads that are not there."""
    global _computed_in
    if _computed_in is not None and inherited(_computed_in):
        raise ForkedError(
            "the process that this one was forked from had a context or made a plan, and its compute threads stayed "
            "there; do that for the first time after the fork, or start processes with the method 'spawn'"
        )
    _computed_in = _forks


def stop_at_exit(thing: Stoppable) -> None:
    """Have it stopped before the interpreter ends. Does not return to another thread that asks when it is ending."""
    with _gate:
        _living.add(thing)


def _after_fork() -> None:
    global _forks, _living, _gate
    _forks += 1
    _gate = threading.RLock()
    _living = weakref.WeakSet()  # whoever held the old one's lock is not here


def ending() -> bool:
    """Whether the interpreter ends. A thread that begins something then waits for ever: work is for the main one."""
    return _ending


def _stop_all() -> None:
    global _ending
    _ending = True
    _gate.acquire()  # and keep it: nothing begins any more
    deadline = time.monotonic() + EXIT_S
    for thing in list(_living):
        if not thing._stop(max(0.0, deadline - time.monotonic())):
            thing._abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)

# finalizers run at exit from a hook that the first of them registers, and later hooks run earlier: this way things have
# stopped before they are freed
weakref.finalize(Stoppable, id, None)
atexit.register(_stop_all)
