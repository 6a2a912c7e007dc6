"""Every change that the bench makes to the machine is written down first, and undone whatever happens.

A journal file per run lists the changes: a cgroup, a sysctl, a queue setting, a trace instance, a child process.
They are undone when the run leaves its `with`; if it was killed, by a guard process that waits for its end; and if
that was killed too, by the next start.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

STATE_DIR = Path(os.environ.get("SUPERLLAMA_BENCH_STATE", "/var/tmp/superllama-bench"))


def start_time(pid: int) -> str | None:
    """When a process started, in clock ticks: tells it from a later one with the same id. None = it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[19]


class Journal:
    """The changes of this process. Entries: {"kind": file | cgroup | process | rmdir | umount, ...}."""

    def __init__(self) -> None:
        recover()
        STATE_DIR.mkdir(parents=True, exist_ok=True)
        pid = os.getpid()
        self.path = STATE_DIR / f"undo-{pid}.jsonl"
        self.entries: list[dict] = []
        self._owner = {"pid": pid, "start": start_time(pid)}
        self._write()
        # the guard's standard input is a pipe that only this process holds: it ends when this process does
        self._guard = subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(self.path)],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def add(self, kind: str, **what: str | int | None) -> dict:
        entry = {"kind": kind, **what}
        self.entries.append(entry)
        self._write()
        return entry

    def undo(self, entry: dict) -> None:
        if entry in self.entries:
            undo_entry(entry)
            self.entries.remove(entry)
            self._write()

    def close(self) -> None:
        for entry in reversed(list(self.entries)):
            self.undo(entry)
        if self._guard.stdin:
            self._guard.stdin.close()
        self._guard.wait()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write(self) -> None:
        partial = self.path.with_suffix(".partial")
        with partial.open("w") as out:
            out.write("".join(json.dumps(e) + "\n" for e in [self._owner, *self.entries]))
            out.flush()
            os.fsync(out.fileno())
        partial.replace(self.path)

    @contextlib.contextmanager
    def setting(self, path: Path, value: str) -> Iterator[None]:
        """Write a value to a kernel setting; the old one comes back at the end."""
        old = path.read_text().strip()
        entry = self.add("file", path=str(path), value=old)
        try:
            path.write_text(value)
            yield
        finally:
            self.undo(entry)

    @contextlib.contextmanager
    def process(self, child: subprocess.Popen) -> Iterator[subprocess.Popen]:
        entry = self.add("process", pid=child.pid, start=start_time(child.pid))
        try:
            yield child
        finally:
            self.undo(entry)
            child.wait()


def undo_entry(entry: dict) -> None:
    kind = entry["kind"]
    if kind == "file":
        with contextlib.suppress(FileNotFoundError):
            Path(entry["path"]).write_text(entry["value"])
    elif kind == "process":
        if entry["start"] is not None and start_time(entry["pid"]) == entry["start"]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(entry["pid"], signal.SIGKILL)
    elif kind == "cgroup":
        remove_cgroup(Path(entry["path"]))
    elif kind == "rmdir":
        with contextlib.suppress(FileNotFoundError):
            Path(entry["path"]).rmdir()
    elif kind == "umount":
        subprocess.run(["umount", entry["path"]], capture_output=True)


def remove_cgroup(path: Path, patience_s: float = 10.0) -> None:
    """Kill what still runs in the group, wait until it is empty, remove it."""
    deadline = time.monotonic() + patience_s
    while path.is_dir():
        for pid in (path / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        with contextlib.suppress(OSError):
            (path / "memory.force_empty").write_text("0")  # v1: hand the page cache back
        try:
            path.rmdir()
        except OSError as error:
            if time.monotonic() > deadline:
                raise RuntimeError(f"cannot remove cgroup {path}: {error}; try 'rmdir {path}' later") from error
            time.sleep(0.05)


def undo_journal(path: Path) -> None:
    try:
        _, *entries = [json.loads(line) for line in path.read_text().splitlines()]
    except (FileNotFoundError, ValueError):
        return
    for entry in reversed(entries):
        with contextlib.suppress(OSError, RuntimeError):
            undo_entry(entry)
    path.unlink(missing_ok=True)


def recover() -> int:
    """Undo what killed runs left behind; returns how many journals there were."""
    found = 0
    for path in STATE_DIR.glob("undo-*.jsonl"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            owner = json.loads(path.read_text().splitlines()[0])
            if start_time(owner["pid"]) != owner["start"]:
                undo_journal(path)
                found += 1
    return found


if __name__ == "__main__":  # the guard
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    undo_journal(Path(sys.argv[1]))
