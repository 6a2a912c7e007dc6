"""The RPC server of a bundle: it lends the engine of its group the memory and the processors that the bundle has."""

from __future__ import annotations

import contextlib
import os
import socket
import tempfile
import time
from pathlib import Path

from .._closing import Closing
from .._engine.starting import free_port
from .._errors import Error
from .._programs import find_program, program_environment, server_environment
from .tied import Tied

START_S = 600  # a folder of models is looked through first, a second for each gigabyte
POLL_S = 0.02


class RpcServer(Closing):
    """superllama-rpc-server at `host`, on `port` if that is free, and on another one else. It knows `secret`.

    Raises: Error with what it says where it does not start.
    """

    def __init__(
        self, host: str, threads: int, secret: str, *, port: int = 0, model_dir: str | os.PathLike[str] | None = None
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="superllama-part-")
        try:
            if model_dir is not None and not Path(model_dir).is_dir():
                raise Error(f"model_dir={os.fspath(model_dir)!r} is no folder on the node {host}")
            try:
                self.endpoint = f"{host}:{free_port(host, port)}"
            except OSError as e:
                raise Error(f"no port of {host} is free for an RPC server: {e}") from e
            program = find_program("ggml-rpc-server")
            words = [str(program), "-H", host, "-p", self.endpoint.rpartition(":")[2], "-t", str(threads)]
            words += ["--rpc-secret", str(secret_file(Path(self._folder.name), secret))]
            words += ["--model-dir", os.fspath(model_dir)] if model_dir is not None else []
            self._process = Tied(words, program_environment(program, server_environment()))
        except BaseException:
            self._folder.cleanup()
            raise
        try:
            self._wait_until_it_listens()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Of the process that watches the one which serves."""
        return self._process.pid

    def wait(self, timeout: float | None = None) -> str | None:
        """Why it has ended; None where it still runs after so many seconds."""
        if not self._process.wait(timeout):
            return None
        return f"its RPC server {self._process.end()}"

    def close(self) -> None:
        """End it. Twice is fine."""
        self._process.close()
        self._folder.cleanup()

    def _wait_until_it_listens(self) -> None:
        host, port = self.endpoint.rsplit(":", 1)
        end = time.monotonic() + START_S
        while True:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
                return
            if (why := self.wait(POLL_S)) is not None:
                raise Error(f"no part of a group can be at {host}: {why}")
            if time.monotonic() > end:
                raise Error(f"the RPC server at {self.endpoint} does not listen after {START_S} s")


def secret_file(folder: Path, secret: str) -> Path:
    """A file with the secret, for its owner only."""
    path = folder / "secret"
    path.touch(0o600)
    path.write_text(secret)
    return path
