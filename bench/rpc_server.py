"""An RPC server on this machine as a run's device: a process with memory of its own, over loopback."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from superllama._programs import find_program, server_environment

START_S = 60.0


class Server:
    """A running one. `endpoint` is what --rpc takes."""

    def __init__(self, threads: int, *flags: object, environment: Mapping[str, str] | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.endpoint = f"127.0.0.1:{port}"
        command = [find_program("ggml-rpc-server"), "-H", "127.0.0.1", "-p", port, "-t", threads, *flags]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        begin = time.monotonic()
        env = server_environment() | (environment or {})
        self._process = subprocess.Popen(list(map(str, command)), env=env, **quiet)
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            if self._process.poll() is not None or time.monotonic() - begin > START_S:
                self.close()
                raise RuntimeError(f"{command[0]} does not serve; start it by hand to see why")
            time.sleep(0.01)
        self.ready_s = time.monotonic() - begin

    def in_use(self) -> int:
        """Bytes that are its own in memory: of the program, and of the process beneath it, which serves."""
        pid = self._process.pid
        pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
        pages = 0
        for one in pids:
            _, resident, shared, *_ = map(int, Path(f"/proc/{one}/statm").read_text().split())
            pages += resident - shared
        return pages * os.sysconf("SC_PAGESIZE")

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def serving(threads: int, *flags: object, environment: Mapping[str, str] | None = None) -> Iterator[Server]:
    with contextlib.closing(Server(threads, *flags, environment=environment)) as server:
        yield server
