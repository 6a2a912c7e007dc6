"""Builds the native test programs in the build folder that `pip install` left, says where they are, and runs them."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
BUILD = Path(os.environ.get("SUPERLLAMA_BUILD", ROOT / "build"))


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """By this process: pytest may run in several."""
    with path.open("w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def native_programs() -> Path:
    """The folder of the programs of tests/native; compiles what is not there yet, llama.cpp itself not again."""
    cache = BUILD / "CMakeCache.txt"
    if not cache.exists():
        raise RuntimeError(f"{BUILD} is not configured; install superllama from this folder first: pip install .")
    settings = dict(re.findall(r"^(\w+):\w+=(.*)$", cache.read_text(), re.MULTILINE))
    cmake, ninja = settings["CMAKE_COMMAND"], settings["CMAKE_MAKE_PROGRAM"]
    if not (Path(cmake).exists() and Path(ninja).exists()):
        # pip configured the folder with tools of its own, which are gone
        cmake, ninja = shutil.which("cmake") or "", shutil.which("ninja") or ""
        if not (cmake and ninja):
            raise RuntimeError('cmake and ninja are needed for the native tests: pip install ".[test]"')
    with locked(BUILD / "tests.lock"):
        # once more, without the binding, which can be built under pip only
        run(cmake, "-S", str(ROOT), "-B", str(BUILD), f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DSKBUILD_STATE=tests")
        run(cmake, "--build", str(BUILD), "--target", "superllama-tests", "superllama-bench")
    return BUILD / "tests" / "native"


def arch_models(folder: Path, names: str | None = None) -> dict[str, Path]:
    """A tiny random model of every architecture that upstream can save, or of those that an expression matches."""
    command = [str(native_programs() / "make-arch-models"), "-o", f"{folder}/", *(["-a", names] if names else [])]
    subprocess.run(command, check=True, capture_output=True, timeout=600, stdin=subprocess.DEVNULL)
    return {path.stem: path for path in folder.glob("*.gguf")}


def run_native(program: str, *arguments: object) -> dict[str, Any]:
    """What one of the programs reports: greedy tokens and a hash over all logits, of "probe" and "probe-stock"."""
    command = [native_programs() / program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{(done.stdout + done.stderr)[-4000:]}")
