"""Trace the disk's reads of one file at the block layer: by tracefs where the kernel has it, else by blktrace.

Events stay in memory while the run goes on (the kernel's ring buffer, /dev/shm): a trace that is written to the
disk that it traces slows what it measures. The kernel filters by device and by the file's span on it.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from bench import undo
from bench.device import Disk
from bench.trace import blkparse
from bench.trace.extents import Extents

BUFFER_MB = 64  # over all processors; an event takes about 100 bytes


def find_tracefs() -> Path | None:
    for path in (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing")):
        if (path / "events/block/block_rq_issue").is_dir():
            return path
    return None


def available(tool: str = "auto") -> tuple[str | None, str]:
    """Which tool would run, or None and the reason."""
    if os.geteuid() != 0:
        return None, "block tracing needs root: no request sizes, gaps and per-layer reads of stock runs"
    if tool in ("auto", "tracefs") and (find_tracefs() or "tracefs" in Path("/proc/filesystems").read_text()):
        return "tracefs", ""
    if tool in ("auto", "blktrace") and shutil.which("blktrace"):
        return "blktrace", ""
    return None, "no block tracing: the kernel has no tracefs and blktrace is not installed (apt install blktrace)"


class TracefsTracer:
    """An instance of its own: its own buffer and filter, gone when it is removed."""

    def __init__(self, journal: undo.Journal, disk: Disk, extents: Extents) -> None:
        self._stack = contextlib.ExitStack()
        root = find_tracefs()
        if root is None:
            root = undo.STATE_DIR / f"tracefs-{os.getpid()}"
            folder = journal.add("rmdir", path=str(root))
            root.mkdir(parents=True, exist_ok=True)
            self._stack.callback(journal.undo, folder)
            mount = journal.add("umount", path=str(root))
            subprocess.run(["mount", "-t", "tracefs", "none", str(root)], check=True)
            self._stack.callback(journal.undo, mount)
        if not (root / "events/block/block_rq_issue").is_dir():
            self._stack.close()
            raise RuntimeError("tracefs has no block events: the kernel was built without CONFIG_BLK_DEV_IO_TRACE")
        self.path = root / f"instances/superllama-bench-{os.getpid()}"
        instance = journal.add("rmdir", path=str(self.path))
        self._stack.callback(journal.undo, instance)
        self.path.mkdir()
        low, high = extents.span()
        major, minor = (int(n) for n in disk.disk_number.split(":"))
        what = f"dev == {(major << 20) | minor} && sector >= {low // 512} && sector < {-(-high // 512)}"
        self._write("buffer_size_kb", str((BUFFER_MB << 10) // (os.cpu_count() or 1)))
        self._write("trace_clock", "mono")
        for event in ("block_rq_issue", "block_rq_complete", "block_rq_requeue"):
            self._write(f"events/block/{event}/filter", what)
            self._write(f"events/block/{event}/enable", "1")

    def _write(self, name: str, value: str) -> None:
        (self.path / name).write_text(value)

    def start(self) -> None:
        self._write("trace", "")
        self._write("tracing_on", "1")

    def stop(self) -> blkparse.Requests:
        """Times are on CLOCK_MONOTONIC."""
        self._write("tracing_on", "0")
        stats = [line for path in self.path.glob("per_cpu/cpu*/stats") for line in path.read_text().splitlines()]
        with (self.path / "trace").open() as lines:
            out = blkparse.parse(lines)
        out.lost = blkparse.lost_events(stats)
        return out

    def close(self) -> None:
        self._stack.close()


class BlktraceTracer:
    """blktrace into /dev/shm, blkparse at the end."""

    def __init__(self, journal: undo.Journal, disk: Disk, extents: Extents) -> None:
        self._journal, self._disk = journal, disk
        self._debugfs = None
        if not Path("/sys/kernel/debug/block").is_dir():
            self._debugfs = journal.add("umount", path="/sys/kernel/debug")
            subprocess.run(["mount", "-t", "debugfs", "none", "/sys/kernel/debug"], check=True)
        self._folder = Path("/dev/shm") / f"superllama-bench-{os.getpid()}"
        self._folder.mkdir(exist_ok=True)

    def start(self) -> None:
        command = [
            "blktrace",
            "-d",
            f"/dev/{self._disk.name}",
            "-a",
            "read",
            "-a",
            "issue",
            "-a",
            "complete",
            "-a",
            "requeue",
            "-D",
            str(self._folder),
            "-o",
            "trace",
        ]
        self._child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        self._entry = self._journal.add("process", pid=self._child.pid, start=undo.start_time(self._child.pid))
        time.sleep(0.3)  # it opens its files
        self._start = time.monotonic() - 0.3
        if self._child.poll() is not None:
            raise RuntimeError(f"blktrace ended at once: {self._child.stderr.read().strip()}")

    def stop(self) -> blkparse.Requests:
        """Times are relative to the first event, put on CLOCK_MONOTONIC by when it was started (within 0.3 s)."""
        self._child.send_signal(signal.SIGINT)
        _, messages = self._child.communicate(timeout=60)
        self._journal.undo(self._entry)
        done = subprocess.run(["blkparse", "-i", "trace", "-D", str(self._folder)], capture_output=True, text=True)
        out = blkparse.parse(done.stdout.splitlines())
        out.lost = blkparse.lost_events(messages.splitlines())
        for r in out.reads:
            r.issued += self._start
            r.done = None if r.done is None else r.done + self._start
        return out

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._debugfs:
            self._journal.undo(self._debugfs)


def tracer(tool: str, journal: undo.Journal, disk: Disk, extents: Extents) -> TracefsTracer | BlktraceTracer:
    return {"tracefs": TracefsTracer, "blktrace": BlktraceTracer}[tool](journal, disk, extents)
