"""What this machine and this build can do, as one dict: the substance of `superllama doctor`."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import re
import tempfile
from pathlib import Path
from typing import Any

from ._backends import backend_files
from ._cache import cache_dir
from ._programs import find_bin_dir
from ._read_speed import measure_read

READ_BYTES = 256 * 1000 * 1000
READ_SECONDS = 20.0


def report(folder: Path | None = None, *, measure: bool = True) -> dict[str, Any]:
    """Versions, backends, devices, memory, CPU features, and the read speed of `folder` (or of a file).

    Raises: OSError if the folder cannot be written or the file cannot be read.
    """
    from . import __version__
    from ._memory import backends, devices, memory, n_physical_cores
    from ._native import lib, text, upstream_build, version

    features = cpu_features(text(lib.llama_print_system_info()))
    found = {
        "versions": {
            "superllama": __version__,
            "library": version(),
            "llama.cpp": text(lib.llama_version()),
            "llama.cpp build": upstream_build(),
            "python": platform.python_version(),
            "system": platform.platform(),
        },
        "backends": backends(),
        "devices": [dataclasses.asdict(device) for device in devices()],
        "backend_packages": [str(path) for path in backend_files()],
        "cpu": {
            "physical_cores": n_physical_cores(),
            "features": features,
            "quota": lib.superllama_cpu_quota() or None,
            "pressure": cpu_pressure(),
            "amx": {"cpu": "amx_int8" in cpu_flags(), "build": "AMX_INT8" in features},
        },
        "memory": dataclasses.asdict(memory()),
        "supports": {
            "mmap": bool(lib.llama_supports_mmap()),
            "mlock": bool(lib.llama_supports_mlock()),
            "gpu_offload": bool(lib.llama_supports_gpu_offload()),
            "rpc": bool(lib.llama_supports_rpc()),
        },
        "build": build_facts(),
        "huge_pages": huge_pages(),
        "cache": str(cache_dir()),
    }
    if measure:
        found["read_speed"] = read_speed(folder or Path(tempfile.gettempdir()))
    return found


def cpu_features(system_info: str) -> list[str]:
    """The features that llama_print_system_info() says are there: "CPU : AVX2 = 1 | F16C = 1 | ..."."""
    pairs = (part.split(":")[-1].split("=") for part in system_info.split("|") if "=" in part)
    return [pair[0].strip() for pair in pairs if pair[1].strip() != "0"]


def build_facts() -> dict[str, Any]:
    """What was compiled in: https, page, openmp, portable, compiler; empty if the package was built by other means."""
    folder = find_bin_dir()
    try:
        facts: dict[str, Any] = json.loads((folder.parent / "_build.json").read_text()) if folder else {}
    except (OSError, ValueError):
        return {}
    return facts


# ---------------------------------------------------------------- what the system allows


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def cpu_flags(root: Path = Path("/")) -> set[str]:
    """The flags of the first CPU in /proc/cpuinfo; empty where there is none."""
    line = re.search(r"^flags\s*:(.*)$", _read(root / "proc/cpuinfo"), re.MULTILINE)
    return set(line[1].split()) if line else set()


def cpu_pressure(root: Path = Path("/")) -> float | None:
    """The share of the last ten seconds in which something waited for a core, 0 to 1; None where the kernel does not
    measure it. Kernels that compute beside others wait for each other."""
    some = re.search(r"^some avg10=([\d.]+)", _read(root / "proc/pressure/cpu"), re.MULTILINE)
    return float(some[1]) / 100 if some else None


def huge_pages(root: Path = Path("/")) -> str | None:
    """Transparent huge pages: "always", "madvise" (which is enough), "never", or None where there are none."""
    chosen = re.search(r"\[(\w+)\]", _read(root / "sys/kernel/mm/transparent_hugepage/enabled"))
    return chosen[1] if chosen else None


# ---------------------------------------------------------------- read speed


def read_speed(path: Path) -> dict[str, Any]:
    """Read 256 MB: from `path` if it is a file, else from a file written into the folder for the purpose.

    Returns: path, bytes, seconds, gb_per_s, and `how`, as ReadSpeed has it.
    """
    if path.is_file():
        return _measure(path)
    with tempfile.NamedTemporaryFile(prefix="superllama-doctor-", dir=path) as f:
        block = os.urandom(1 << 20)  # so that no file system compresses it away
        for _ in range(READ_BYTES // len(block)):
            f.write(block)
        f.flush()
        os.fsync(f.fileno())
        return {**_measure(Path(f.name)), "path": str(path)}


def _measure(path: Path) -> dict[str, Any]:
    speed = measure_read(path, max_bytes=READ_BYTES, max_seconds=READ_SECONDS)
    return {
        "path": str(path),
        "bytes": speed.bytes,
        "seconds": round(speed.seconds, 4),
        "gb_per_s": round(speed.bytes_per_s / 1e9, 3),
        "how": speed.how,
    }
