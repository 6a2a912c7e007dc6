"""RPC servers on loopback: devices with memory of their own, in processes of their own. No GPU is needed."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from superllama._programs import find_program


@dataclass
class Server:
    """A running server; `endpoint` is what --rpc takes."""

    process: subprocess.Popen[bytes]
    endpoint: str

    def resident_bytes(self) -> int:
        """Memory of the process that is its own."""
        fields = Path(f"/proc/{self.process.pid}/statm").read_text().split()
        return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGESIZE")


@contextlib.contextmanager
def rpc_server(threads: int = 1) -> Iterator[Server]:
    """A server with one CPU device, that gives freed memory back to the system at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [find_program("ggml-rpc-server"), "-H", "127.0.0.1", "-p", str(port), "-t", str(threads)]
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=env)
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
