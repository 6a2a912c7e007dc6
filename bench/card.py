"""A card as the bench sees it: which one it is, how fast bytes get there, what is in use of it, another program there.

As a program it answers one question and ends, so that its driver's memory on the card goes with it:

    python -m bench.card ask THREADS [HOST:PORT]   what card (or RPC server), and how fast the link and the host's
                                                   memory are; JSON
    python -m bench.card hold                      for every line on standard input: has that many bytes of the card
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cffi
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
NO_CARD = (
    "this build of superllama finds no card. On a machine with one, bench/run_gpu.sh builds for it and runs this "
    "command; on any other, 'bench/run_gpu.sh --computed' runs it on a Vulkan card that Mesa computes, which says "
    "that it works and nothing about speed"
)
UPLOAD_BYTES = 256 << 20  # less on a card where that would be much
STEP_BYTES = 8 << 20  # of one copy
CHUNK_BYTES = 64 << 20  # in which another program takes its memory
RAM_BYTES = 1 << 30
REPEATS = 4  # the best of them counts: a bound is what the machine can do

_GGML = """
typedef struct ggml_backend_device * dev_t;
typedef struct ggml_backend_buffer_type * buft_t;
typedef struct ggml_backend_buffer * buffer_t;
struct ggml_init_params { size_t mem_size; void * mem_buffer; bool no_alloc; };
buft_t ggml_backend_dev_buffer_type(dev_t device);
buft_t ggml_backend_dev_host_buffer_type(dev_t device);
buffer_t ggml_backend_buft_alloc_buffer(buft_t buft, size_t size);
void * ggml_backend_buffer_get_base(buffer_t buffer);
void ggml_backend_buffer_free(buffer_t buffer);
void * ggml_init(struct ggml_init_params params);
void ggml_free(void * ctx);
void * ggml_new_tensor_1d(void * ctx, int type, int64_t ne0);
buffer_t ggml_backend_alloc_ctx_tensors_from_buft(void * ctx, buft_t buft);
void ggml_backend_tensor_set(void * tensor, const void * data, size_t offset, size_t size);
void ggml_backend_tensor_get(const void * tensor, void * data, size_t offset, size_t size);
"""
_I8 = 24  # of enum ggml_type


@dataclass(frozen=True)
class Speeds:
    """Bytes per second."""

    link: float  # to the card, from page-locked memory; 0: its backend gives none
    link_pageable: float
    ram: float  # the host's memory, read


@dataclass(frozen=True)
class Card:
    name: str
    description: str
    backend: str
    free_bytes: int
    total_bytes: int
    speeds: Speeds

    @property
    def computed(self) -> bool:
        """By Mesa, on the processor: its memory is counted in each process alone (tests/native/limited-gpu.cpp)."""
        return "LIMITED_GPU_BYTES" in os.environ


def ask(threads: int, server: str = "") -> Card | None:
    """The first card of this build, or the RPC server at HOST:PORT, looked at by a process of its own; None where there
    is none.

    Raises: RuntimeError if that process fails.
    """
    command = [sys.executable, "-m", "bench.card", "ask", str(threads), *filter(None, [server])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise RuntimeError(f"the card could not be asked: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
    said = json.loads(done.stdout.splitlines()[-1])
    return Card(**{**said, "speeds": Speeds(**said["speeds"])}) if said else None


def visible() -> dict[str, str]:
    """The environment of every process of the bench: one card, the one that NVML is asked about."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    return {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": first}


# ---------------------------------------------------------------- memory in use


class Nvml:
    """What nvidia-smi asks: memory in use of the card by whomever. Not of a process, whose number is another one within
    a container."""

    class Memory(ctypes.Structure):
        _fields_ = [(name, ctypes.c_ulonglong) for name in ("total", "free", "used")]

    def __init__(self) -> None:
        """Raises: OSError where there is no NVIDIA driver, or not another card is meant."""
        if "LIMITED_GPU_BYTES" in os.environ:
            raise OSError("the card is computed")
        self._lib = ctypes.CDLL("libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        first = visible()["CUDA_VISIBLE_DEVICES"]
        by = self._lib.nvmlDeviceGetHandleByIndex_v2 if first.isdigit() else self._lib.nvmlDeviceGetHandleByUUID
        wanted = ctypes.c_uint(int(first)) if first.isdigit() else ctypes.c_char_p(first.encode())
        if self._lib.nvmlInit_v2() != 0 or by(wanted, ctypes.byref(self._handle)) != 0:
            raise OSError(f"NVML has no card {first!r}")
        self.used()

    def used(self) -> int:
        memory = self.Memory()
        if self._lib.nvmlDeviceGetMemoryInfo(self._handle, ctypes.byref(memory)) != 0:
            raise OSError("NVML does not say how much memory is in use")
        return int(memory.used)


def nvml() -> Nvml | None:
    """None: only a run's own backend shows how much it takes."""
    try:
        return Nvml()
    except (OSError, AttributeError):
        return None


# ---------------------------------------------------------------- another program


class OtherProgram:
    """A program that has some of the card's memory. A card that is computed is told so by a file."""

    def __init__(self, computed: bool) -> None:
        self.environment: Mapping[str, str] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="superllama-taken-")
        self._taken = Path(self._folder.name) / "taken"
        self._child: subprocess.Popen[str] | None = None
        if computed:
            self._taken.write_text("0")
            self.environment = {"LIMITED_GPU_TAKEN": str(self._taken)}
            return
        command = [sys.executable, "-m", "bench.card", "hold"]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, text=True, cwd=ROOT, env=visible())

    def hold(self, n_bytes: int) -> None:
        """From now on; it takes as much as it gets, and goes on trying."""
        if self._child is None:
            self._taken.write_text(str(n_bytes))
            return
        assert self._child.stdin
        self._child.stdin.write(f"{n_bytes}\n")
        self._child.stdin.flush()

    def close(self) -> None:
        if self._child:
            self._child.communicate()
        self._folder.cleanup()


def _hold(ggml: Ggml, lines: Iterator[str]) -> None:
    wanted, ended = 0, False

    def listen() -> None:
        nonlocal wanted, ended
        for line in lines:
            wanted = int(line)
        ended = True

    threading.Thread(target=listen, daemon=True).start()
    chunks: list[Any] = []
    while not ended:
        while (len(chunks) + 1) * CHUNK_BYTES <= wanted and (chunk := ggml.allocate(CHUNK_BYTES)):
            chunks.append(chunk)
        while chunks and len(chunks) * CHUNK_BYTES > wanted:
            ggml.free(chunks.pop())
        time.sleep(0.02)


# ---------------------------------------------------------------- the backend, without our library between


class Ggml:
    """The calls of ggml that the package has no use for itself, of the libraries that it has loaded."""

    def __init__(self) -> None:
        from superllama._native import ffi as package_ffi
        from superllama._native import lib as package

        device = package.ggml_backend_dev_by_type(package.GGML_BACKEND_DEVICE_TYPE_GPU)  # which loads the backends
        loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
        names = ("libsuperllama-ggml-base", "libggml-base")
        self.ffi = cffi.FFI()
        self.ffi.cdef(_GGML)
        library: Any = self.ffi.dlopen(next(path for path in loaded if Path(path).name.startswith(names)))
        self.lib = library
        self._device = self.ffi.cast("dev_t", int(package_ffi.cast("uintptr_t", device)))
        self._buft = self.lib.ggml_backend_dev_buffer_type(self._device)

    def allocate(self, n_bytes: int) -> Any:
        """Memory of the card; None where there is none left."""
        return self.lib.ggml_backend_buft_alloc_buffer(self._buft, n_bytes) or None

    def free(self, buffer: Any) -> None:
        self.lib.ggml_backend_buffer_free(buffer)

    def upload_speeds(self, n_bytes: int) -> tuple[float, float]:
        """Bytes per second from page-locked memory (0: the backend gives none) and from pageable memory."""
        pageable = mmap.mmap(-1, n_bytes)
        np.frombuffer(pageable, np.uint8)[:] = 1
        locked_buft = self.lib.ggml_backend_dev_host_buffer_type(self._device)
        locked = self.lib.ggml_backend_buft_alloc_buffer(locked_buft, n_bytes) if locked_buft else None
        context = self.lib.ggml_init(self.ffi.new("struct ggml_init_params *", (1 << 16, self.ffi.NULL, True))[0])
        tensor = self.lib.ggml_new_tensor_1d(context, _I8, n_bytes)
        buffer = self.lib.ggml_backend_alloc_ctx_tensors_from_buft(context, self._buft)
        if not buffer:
            raise RuntimeError(f"no {n_bytes >> 20} MiB are free on the card: end what else uses it")
        try:
            from_locked = 0.0
            if locked:
                base = self.ffi.cast("char *", self.lib.ggml_backend_buffer_get_base(locked))
                self.ffi.memmove(base, pageable, n_bytes)
                from_locked = self._upload(tensor, base, n_bytes)
            return from_locked, self._upload(tensor, self.ffi.from_buffer("char[]", pageable), n_bytes)
        finally:
            self.lib.ggml_backend_buffer_free(buffer)
            self.lib.ggml_free(context)
            if locked:
                self.lib.ggml_backend_buffer_free(locked)

    def _upload(self, tensor: Any, data: Any, n_bytes: int) -> float:
        last, best = self.ffi.new("char[1]"), 0.0
        for _ in range(REPEATS):
            begin = time.perf_counter()
            for at in range(0, n_bytes, STEP_BYTES):
                self.lib.ggml_backend_tensor_set(tensor, data + at, at, STEP_BYTES)
            self.lib.ggml_backend_tensor_get(tensor, last, n_bytes - 1, 1)  # all of it has arrived
            best = max(best, n_bytes / (time.perf_counter() - begin))
        return best


def ram_speed(threads: int, n_bytes: int = RAM_BYTES) -> float:
    """Bytes per second that so many threads read of the host's memory together."""
    memory = np.ones(n_bytes // 8, np.int64)
    parts, best = np.array_split(memory, threads), 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(REPEATS):
            begin = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))  # reads only, and lets go of the interpreter's lock
            best = max(best, memory.nbytes / (time.perf_counter() - begin))
    return best


def _look(threads: int, server: str) -> Card | None:
    import superllama

    if server:
        superllama.add_rpc_server(server)
    card = next((d for d in superllama.devices() if d.kind == "gpu" and (server or d.backend != "RPC")), None)
    if card is None:
        return None
    n_bytes = min(UPLOAD_BYTES, card.memory_free // 4 // STEP_BYTES * STEP_BYTES)
    link, pageable = Ggml().upload_speeds(n_bytes)
    speeds = Speeds(link, pageable, ram_speed(threads))
    return Card(card.name, card.description, card.backend, card.memory_free, card.memory_total, speeds)


def main() -> int:
    os.environ.update(visible())
    if sys.argv[1] == "hold":
        _hold(Ggml(), sys.stdin)
    else:
        card = _look(int(sys.argv[2]), "".join(sys.argv[3:]))
        print(json.dumps(card and {**vars(card), "speeds": vars(card.speeds)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
