"""What this machine is and what it lacks for the study, each missing thing with what it costs."""

from __future__ import annotations

import os
import platform
import resource
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import cgroup, device, page_cache
from bench.pressure import total_memory
from bench.sizes import format_size
from bench.trace import block, extents


@dataclass(frozen=True)
class Check:
    what: str
    ok: bool
    found: str
    cost: str = ""  # of its absence

    def line(self) -> str:
        return f"{'ok  ' if self.ok else 'MISS'} {self.what}: {self.found}" + (
            f" -> {self.cost}" if not self.ok and self.cost else ""
        )


def _swap() -> Check:
    rows = Path("/proc/swaps").read_text().splitlines()[1:]
    size = sum(int(r.split()[2]) for r in rows) * 1024
    cost = "swappiness can be set but has nothing to swap: anonymous memory stays, only the page cache gives way"
    return Check("swap", size > 0, format_size(size) if size else "none", cost)


def _memlock() -> Check:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    free = os.geteuid() == 0 or soft == resource.RLIM_INFINITY
    text = "unlimited" if free else format_size(soft)
    return Check("memory that may be locked", free, text, "no pressure by mem_locker: raise it with ulimit -l")


def _cgroup() -> Check:
    root = cgroup.find_root()
    text = f"v{root.version} at {root.path}" if root else cgroup.why_not()
    return Check("memory cgroup", root is not None, text, "pressure by locking memory; no peak, no OOM count per run")


def _psi() -> Check:
    ok = Path("/proc/pressure/memory").exists()
    return Check("PSI", ok, "on" if ok else "off", "no stall times: boot with psi=1")


def _block_trace() -> Check:
    tool, why = block.available()
    return Check("block trace", tool is not None, tool or why, "gaps, request sizes and layers only for our own reader")


def _cachestat(path: Path) -> Check:
    with page_cache.Residency(path) as residency:
        ok = residency.cached_bytes() is not None
    return Check("cachestat(2)", ok, "yes" if ok else "no", "mincore is used; it is slower and does the same")


def _load() -> Check:
    one, *_ = os.getloadavg()
    return Check(
        "idle", one < 0.7, f"load average {one:.1f}", "other work changes the speeds: wait, then measure again"
    )


def _model(path: Path, results: Path) -> list[Check]:
    if not path.is_file():
        return [Check(f"model {path.name}", False, "missing", f"no run: {path} does not exist")]
    size = path.stat().st_size
    out = [Check(f"model {path.name}", True, format_size(size)), _cachestat(path)]
    disk = device.disk_of(path)
    if disk is None:
        text = "its filesystem has no block device (overlay, tmpfs, network)"
        return [*out, Check("disk", False, text, "no disk counters, no read-ahead setting, no block trace")]
    rotational = (disk.sys / "queue/rotational").read_text().strip() == "1"
    kind = "rotating" if rotational else "no seeks"
    out.append(Check("disk", True, f"{disk.name}, {kind}, read-ahead {disk.read_ahead_kb()} KB"))
    try:
        found = extents.read_extents(path, disk.start)
        largest = format_size(int(found.length.max()))
        out.append(Check(f"extents of {path.name}", len(found) > 0, f"{len(found)}, the largest {largest}"))
    except OSError as error:
        out.append(Check(f"extents of {path.name}", False, str(error), "block requests cannot be mapped to the file"))
    free = shutil.disk_usage(results.parent if not results.exists() else results).free
    need = 1 << 30
    out.append(Check("free disk for results", free > need, format_size(free), f"needs {format_size(need)}"))
    return out


def check(models: list[Path], results: Path) -> list[Check]:
    root = os.geteuid() == 0
    cost = "no drop of the whole cache, no swappiness, no read-ahead setting, no block trace; those parts are skipped"
    checks = [Check("root", root, "yes" if root else "no", cost), _cgroup(), _memlock(), _swap(), _psi()]
    checks += [_block_trace(), _load()]
    for model in models:
        checks += [c for c in _model(model, results) if c.what not in {d.what for d in checks}]
    return checks


def describe() -> dict:
    """For the head of every result: without it a number means nothing."""
    cpu = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_bytes": total_memory(),
        "kernel": platform.release(),
        "system": platform.system(),
        "load": os.getloadavg()[0],
    }


def as_dicts(checks: list[Check]) -> list[dict]:
    return [asdict(c) for c in checks]
