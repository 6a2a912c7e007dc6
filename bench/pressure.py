"""Less memory for one run: a memory cgroup, or a program that locks the rest. One interface, so that runs do not care.

with pressure(journal, limit, "auto") as p:
    child = subprocess.Popen(command, preexec_fn=p.enter)
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import cgroup, programs
from bench.sizes import format_size
from bench.undo import Journal

OS_RESERVE = 1 << 30  # left for everything that is not the model, with the locker
METHODS = ("auto", "cgroup", "locker", "none")


@dataclass
class Pressure:
    method: str  # cgroup-v1, cgroup-v2, locker, none
    limit: int | None  # bytes for the run, page cache included; None = what the machine has
    group: cgroup.Group | None = None
    locked: int = 0  # bytes, as the locker reports them

    def enter(self) -> None:
        """In the child, between fork and exec: join the group, and die with the parent."""
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if self.group:
            self.group.enter()

    def peak(self) -> int | None:
        return self.group.peak() if self.group else None

    def oom_kills(self) -> int:
        return self.group.oom_kills() if self.group else 0


def total_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemTotal")


def choose(method: str) -> str:
    if method not in METHODS:
        raise ValueError(f"pressure {method!r}: one of {', '.join(METHODS)}")
    if method == "auto":
        return "cgroup" if cgroup.find_root() else "locker"
    return method


@contextlib.contextmanager
def pressure(
    journal: Journal, limit: int | None, method: str = "auto", reserve: int = OS_RESERVE, build: Path | None = None
) -> Iterator[Pressure]:
    """limit = None: no limit, but still a group of its own (for the peak and the refaults) where there are cgroups."""
    method = choose(method)
    if method == "cgroup" or (limit is None and method != "none" and cgroup.find_root()):
        with cgroup.group(journal, limit) as made:
            yield Pressure(f"cgroup-v{made.root.version}", limit, made)
    elif limit is None or method == "none":
        yield Pressure("none", None)
    else:
        with locker(journal, limit, reserve, build) as locked:
            yield Pressure("locker", limit, None, locked)


def start_locker(command: list[str], preexec: Callable[[], None] | None = None) -> tuple[subprocess.Popen, int]:
    """Start mem_locker and wait for its report; returns it and the bytes it locked."""
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=preexec)
    line = child.stdout.readline() if child.stdout else ""
    report = json.loads(line) if line else {"error": f"ended with {child.wait()} and said nothing", "locked": 0}
    if report["error"]:
        child.kill()
        child.wait()
        wanted, possible = (format_size(report.get(k, 0)) for k in ("wanted", "possible"))
        raise RuntimeError(
            f"mem_locker got {format_size(report['locked'])} of {wanted} ({possible} possible): {report['error']}"
        )
    return child, int(report["locked"])


@contextlib.contextmanager
def locker(journal: Journal, limit: int, reserve: int, build: Path | None = None) -> Iterator[int]:
    """Lock total - reserve - limit. Yields the bytes that are really locked."""
    program = str(programs.find("mem_locker", build))
    child, locked = start_locker([program, "--leave", str(limit), str(reserve)])
    with journal.process(child):
        try:
            yield locked
        finally:
            if child.stdin:
                child.stdin.close()  # its signal to release
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(10)
