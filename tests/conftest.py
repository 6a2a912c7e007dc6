"""What the tests share: models, and a way to run code where a crash would be seen as one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_model as tiny
from native_build import arch_models, locked
from rpc_devices import hide_gpus
from running import Runner

import superllama


def pytest_configure() -> None:
    """A shell's background jobs ignore SIGINT, and so would the programs that the tests interrupt."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny_model(model_dir: Path) -> Path:
    return tiny.write_llama(model_dir / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_bert(model_dir: Path) -> Path:
    return tiny.write_bert(model_dir / "bert.gguf")


@pytest.fixture(scope="session")
def tiny_lora(model_dir: Path) -> Path:
    return tiny.write_lora(model_dir / "lora.gguf")


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The real model; the first run on a machine downloads it."""
    return superllama.demo_model()


@pytest.fixture
def model(tiny_model: Path) -> Iterator[superllama.Model]:
    with superllama.Model(tiny_model) as m:
        yield m


@pytest.fixture
def ctx(model: superllama.Model) -> Iterator[superllama.Context]:
    with superllama.Context(model, n_ctx=512) as c:
        yield c


@pytest.fixture(scope="session")
def demo(demo_model: Path) -> Iterator[superllama.Model]:
    with superllama.Model(demo_model) as m:
        yield m


@pytest.fixture
def run_python() -> Runner:
    """Run a script in an interpreter of its own, with arguments; a crash shows in its return code."""

    def run(script: str, *arguments: object, **kwargs: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", script, *map(str, arguments)]
        timeout = 1200 if "LIMITED_GPU_BYTES" in os.environ else 300  # Mesa compiles a card's kernels for minutes, once
        return subprocess.run(command, capture_output=True, text=True, timeout=timeout, **kwargs)  # type: ignore[call-overload]

    return run


@pytest.fixture(scope="session")
def fault_shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library to preload that makes reads and writes fail."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("there is no C compiler to build the library that injects faults")
    source = Path(__file__).parent / "fault_shim.c"
    path = tmp_path_factory.mktemp("shim") / "fault_shim.so"
    command = [compiler, "-O1", "-Wall", "-Werror", "-shared", "-fPIC", source, "-o", path, "-ldl"]
    subprocess.run(command, check=True)
    return path


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The only devices of this test's processes are servers."""
    hide_gpus(monkeypatch)


@pytest.fixture(scope="session")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of every architecture that upstream can save: made by one process, for all of a run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "architectures"
    with locked(folder.with_suffix(".lock")):
        if not folder.exists():
            made = folder.with_suffix(".part")
            made.mkdir(exist_ok=True)
            arch_models(made)
            made.rename(folder)
    return {path.stem: path for path in folder.glob("*.gguf")}
