"""RPC servers on loopback: devices with memory of their own, in processes of their own. No GPU is needed."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from native_build import native_programs
from running import Runner

from superllama._programs import find_program, server_environment

# of processes whose only devices are to be servers, and of the servers
NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "GGML_VK_VISIBLE_DEVICES": ""}


def hide_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in NO_GPU.items():
        monkeypatch.setenv(name, value)


# A script's first lines: MODEL, the device's endpoint ("gpu": the first GPU), the process that has its memory.
PRELUDE = """
import json, os, re, sys, threading, time
import superllama

path, endpoint, pid = sys.argv[1], sys.argv[2], int(sys.argv[3])
if endpoint != "gpu":
    superllama.add_rpc_server(endpoint)
PROMPT = "The capital of France is Paris. The capital of Italy is"

def resident(): # on the device
    if endpoint == "gpu":
        gpu = next(d for d in superllama.devices() if d.kind == "gpu")
        return gpu.memory_total - gpu.memory_free
    with open(f"/proc/{pid}/statm") as file:
        fields = file.read().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGESIZE")

def open_model(**kwargs):
    model = superllama.Model(path, dynamic_layers=True, **kwargs)
    return model, superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1)

def greedy(ctx, n):
    tokens = []
    for _ in range(n):
        tokens.append(int(ctx.logits()[0].argmax()))
        ctx.decode([tokens[-1]])
    return tokens

def on_device():
    return [l.tier for l in model.layers()].count("device")
"""


@dataclass
class Server:
    """A running server; `endpoint` is what --rpc takes."""

    process: subprocess.Popen[bytes]
    endpoint: str

    def serving_pid(self) -> int:
        """The process that has the device's memory: the program watches another one, which serves."""
        pid = self.process.pid
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        return int(children[0]) if children else pid


@contextlib.contextmanager
def rpc_server(
    threads: int = 1,
    *flags: object,
    port: int | None = None,
    log: Path | None = None,
    program: Path | None = None,
    **environment: str,
) -> Iterator[Server]:
    """A server with one CPU device, as superllama-rpc-server starts it. `log` is where its words go."""
    port = port or free_port()
    command = [program or find_program("ggml-rpc-server"), "-H", "127.0.0.1", "-p", port, "-t", threads, *flags]
    with _running(port, *command, log=log, environment=environment) as server:
        yield server


def answer_beside_server(run_python: Runner, script: str, path: Path, *more: object) -> Any:
    """What a script prints, as JSON; its arguments are the path, a server's endpoint, and what more there is."""
    with rpc_server() as server:
        done = run_python(script, path, server.endpoint, *more)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@dataclass
class LimitedServer(Server):
    """One whose device has little memory, and says so."""

    total_bytes: int
    taken: Path  # the bytes that "another program" has there


@contextlib.contextmanager
def limited_server(total_bytes: int, folder: Path) -> Iterator[LimitedServer]:
    taken = folder / "taken"
    taken.write_text("0")
    port = free_port()
    with _running(port, native_programs() / "limited-server", port, total_bytes, taken) as server:
        yield LimitedServer(server.process, server.endpoint, total_bytes, taken)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _running(
    port: int, *command: object, log: Path | None = None, environment: Mapping[str, str] = NO_GPU
) -> Iterator[Server]:
    with (log or Path(os.devnull)).open("ab") as out:
        process = subprocess.Popen(
            list(map(str, command)), stdout=out, stderr=out, env=server_environment() | NO_GPU | environment
        )
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None
            time.sleep(0.05)
        yield Server(process, f"127.0.0.1:{port}")
    finally:
        process.kill()
        process.wait()
        while listens(port):  # the process that serves ends with the one that watches it, a moment later
            time.sleep(0.01)


def listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False
