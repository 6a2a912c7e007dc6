"""What the kernel counts while a process runs: its I/O, faults and CPU, refaults, stall times, the disk, the cache.

A thread takes a sample every interval; totals at the end are exact, as they are read after the process has ended
and before it is reaped.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from bench.cgroup import Group
from bench.device import Disk
from bench.page_cache import PAGE, Residency
from bench.trace.tensors import TensorMap

TICKS = os.sysconf("SC_CLK_TCK")


def process_counters(pid: int) -> dict[str, float]:
    out: dict[str, float] = {}
    with contextlib.suppress(OSError):
        io = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        out["read_bytes"] = int(io["read_bytes"])  # from storage, page cache hits not included
        out["read_calls_bytes"] = int(io["rchar"])
    with contextlib.suppress(OSError):
        f = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        out["minor_faults"], out["major_faults"] = int(f[7]), int(f[9])
        out["cpu_user_s"], out["cpu_system_s"] = int(f[11]) / TICKS, int(f[12]) / TICKS
        out["rss_bytes"] = int(f[21]) * PAGE
        out["block_wait_s"] = int(f[39]) / TICKS  # waiting for block I/O; 0 unless delay accounting is on
    return out


def system_counters(disk: Disk | None) -> dict[str, float]:
    out: dict[str, float] = {}
    wanted = {
        "workingset_refault_file": "refaults_system",
        "pgpgin": "paged_in_kb_system",
        "pgmajfault": "faults_system",
    }
    for line in Path("/proc/vmstat").read_text().splitlines():
        name, value = line.split()
        if name in wanted:
            out[wanted[name]] = int(value)
    for what in ("cpu", "memory", "io"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/pressure/{what}").read_text().splitlines():
                kind, *_, total = line.split()
                out[f"psi_{what}_{kind}_us"] = int(total.removeprefix("total="))
    if disk:
        f = (disk.sys / "stat").read_text().split()
        out["disk_reads"], out["disk_read_bytes"] = int(f[0]), int(f[2]) * 512
        out["disk_busy_ms"] = int(f[9])
    return out


def group_counters(group: Group | None) -> dict[str, float]:
    if group is None:
        return {}
    stat = group.stat()
    refaults = stat.get("workingset_refault_file", stat.get("workingset_refault", 0))
    cache = stat.get("file", stat.get("cache", 0))
    return {"group_bytes": group.usage(), "group_refaults": refaults, "group_cache_bytes": cache,
            "group_major_faults": stat.get("pgmajfault", 0)}  # fmt: skip


class Sampler(threading.Thread):
    """Samples counters every interval_s, and the file's cached part per layer every residency_s."""

    def __init__(
        self, pid: int, group: Group | None, disk: Disk | None, model: Path, where: TensorMap,
        interval_s: float = 0.1, residency_s: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__(daemon=True)
        self._pid, self._group, self._disk, self._model = pid, group, disk, model
        self._interval_s, self._residency_s = interval_s, residency_s
        page_layer = where.layers[where.find(np.arange(-(-where.file_bytes // PAGE)) * PAGE)]
        self._page_slot = page_layer + 1  # slot 0: outside the layers
        self._slot_pages = np.bincount(self._page_slot)
        self._samples: list[dict[str, float]] = []
        self._cached: list[tuple[int, np.ndarray]] = []
        self._stop_now = threading.Event()
        self.t0 = time.monotonic()
        self.cpu_s = 0.0  # what the sampling itself cost
        self._first = system_counters(disk) | group_counters(group)

    def sample(self) -> dict[str, float]:
        now = {"t_us": round((time.monotonic() - self.t0) * 1e6)}
        return now | process_counters(self._pid) | system_counters(self._disk) | group_counters(self._group)

    def run(self) -> None:
        next_residency = 0.0
        with Residency(self._model) as residency:
            while not self._stop_now.wait(self._interval_s):
                start = time.thread_time()
                self._samples.append(self.sample())
                if self._residency_s and time.monotonic() >= next_residency:
                    counts = np.bincount(self._page_slot, weights=residency.pages())
                    self._cached.append((round((time.monotonic() - self.t0) * 1e6), counts))
                    next_residency = time.monotonic() + self._residency_s
                self.cpu_s += time.thread_time() - start

    def finish(self) -> dict[str, float]:
        """After the process ended, before it is reaped. Returns the totals of the run."""
        last = self.sample()
        self._stop_now.set()
        self.join()
        self._samples.append(last)
        totals = {k: v - self._first.get(k, 0) for k, v in last.items() if not k.endswith("_bytes") or k in _GROWING}
        return totals | {"sampler_cpu_s": self.cpu_s}

    def counters_table(self) -> pa.Table:
        names = sorted({name for sample in self._samples for name in sample})
        return pa.table({n: pa.array([s.get(n) for s in self._samples], pa.float64()) for n in names})

    def residency_table(self) -> pa.Table:
        """(t_us, layer, cached_bytes, bytes); layer -1 = token embedding, output, header."""
        t = [t for t, counts in self._cached for _ in counts]
        cached = [float(c) * PAGE for _, counts in self._cached for c in counts]
        n = len(self._slot_pages)
        layers = list(range(-1, n - 1)) * len(self._cached)
        sizes = [float(p) * PAGE for p in self._slot_pages] * len(self._cached)
        columns = {"t_us": (t, pa.int64()), "layer": (layers, pa.int32()), "cached_bytes": (cached, pa.float64()),
                   "bytes": (sizes, pa.float64())}  # fmt: skip
        return pa.table({name: pa.array(values, kind) for name, (values, kind) in columns.items()})


_GROWING = ("read_bytes", "read_calls_bytes", "disk_read_bytes")
