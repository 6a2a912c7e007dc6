"""One cgroup per run (v2 or v1): the limit, the peak, OOM kills and refaults of exactly that run, or a quota of CPU
time.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.undo import Journal

PREFIX = "superllama-bench-"


@dataclass(frozen=True)
class Root:
    """Where groups can be made: version 1 or 2 and the parent folder."""

    version: int
    path: Path


def find_root(mountinfo: str = "/proc/self/mountinfo", controller: str = "memory") -> Root | None:
    """The writable hierarchy of a controller, v2 first; None if there is none, see why_not()."""
    v1 = v2 = None
    for line in Path(mountinfo).read_text().splitlines():
        head, _, tail = line.partition(" - ")
        mount, fs, options = Path(head.split()[4]), tail.split()[0], tail.split()[2]
        if fs == "cgroup2":
            with contextlib.suppress(OSError):
                if controller in (mount / "cgroup.controllers").read_text().split():
                    v2 = Root(2, mount)
        elif fs == "cgroup" and controller in options.split(","):
            v1 = Root(1, mount)
    for root in (v2, v1):
        if root and os.access(root.path, os.W_OK):
            return root
    return None


def why_not(controller: str = "memory") -> str:
    if controller != "memory":
        return f"no cgroup for {controller}: none is mounted writable; making one needs root, or a delegated subtree"
    if os.geteuid() != 0:
        return (
            "no memory cgroup: making one needs root (or a delegated cgroup v2 subtree); run as root, or use "
            "--pressure locker, which needs memory that may be locked (ulimit -l)"
        )
    return (
        "no memory cgroup: neither cgroup v2 with the memory controller nor v1's memory hierarchy is mounted writable"
    )


class Group:
    """A group of this run. Numbers are bytes."""

    def __init__(self, root: Root, path: Path) -> None:
        self.root, self.path = root, path

    def _read(self, name: str) -> str:
        return (self.path / name).read_text()

    def set_limit(self, n_bytes: int) -> None:
        if self.root.version == 2:
            (self.path / "memory.max").write_text(str(n_bytes))
            with contextlib.suppress(OSError):
                (self.path / "memory.swap.max").write_text("0")
        else:
            (self.path / "memory.limit_in_bytes").write_text(str(n_bytes))

    def set_quota(self, cores: float | None) -> None:
        """CPUs' time for all members together; None: as much as they want. Of a group of the controller cpu."""
        period_us = 100_000
        quota = None if cores is None else int(cores * period_us)
        if self.root.version == 2:
            (self.path / "cpu.max").write_text(f"{'max' if quota is None else quota} {period_us}")
        else:
            (self.path / "cpu.cfs_period_us").write_text(str(period_us))
            (self.path / "cpu.cfs_quota_us").write_text(str(-1 if quota is None else quota))

    def set_swappiness(self, value: int) -> bool:
        """v1 keeps one per group; with v2 the system's counts. Returns whether this group took it."""
        path = self.path / "memory.swappiness"
        if path.exists():
            path.write_text(str(value))
        return path.exists()

    def enter(self) -> None:
        """Move the calling process in: between fork and exec of a run."""
        self.take(0)

    def take(self, pid: int) -> None:
        """Move a process in; what it has stays charged where it was."""
        (self.path / "cgroup.procs").write_text(str(pid))

    def peak(self) -> int | None:
        name = "memory.peak" if self.root.version == 2 else "memory.max_usage_in_bytes"
        try:
            return int(self._read(name))
        except OSError:
            return None  # v2 before Linux 5.19

    def usage(self) -> int:
        return int(self._read("memory.current" if self.root.version == 2 else "memory.usage_in_bytes"))

    def oom_kills(self) -> int:
        text = self._read("memory.events" if self.root.version == 2 else "memory.oom_control")
        return {k: int(v) for k, v in (line.split() for line in text.splitlines())}.get("oom_kill", 0)

    def stat(self) -> dict[str, int]:
        """memory.stat; refaults are workingset_refault_file."""
        return {k: int(v) for k, v in (line.split() for line in self._read("memory.stat").splitlines())}


@contextlib.contextmanager
def group(journal: Journal, limit: int | None, controller: str = "memory") -> Iterator[Group]:
    root = find_root(controller=controller)
    if root is None:
        raise RuntimeError(why_not(controller))
    if root.version == 2:
        control = root.path / "cgroup.subtree_control"
        if controller not in control.read_text().split():
            control.write_text(f"+{controller}")  # left on: turning it off could take it from others
    number = sum(1 for _ in root.path.glob(f"{PREFIX}{os.getpid()}-*"))
    path = root.path / f"{PREFIX}{os.getpid()}-{number}"
    entry = journal.add("cgroup", path=str(path))
    path.mkdir()
    try:
        made = Group(root, path)
        if limit is not None:
            made.set_limit(limit)
        yield made
    finally:
        journal.undo(entry)
