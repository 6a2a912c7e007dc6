"""Server: superllama-server as a process beside this one, for clients of OpenAI's API."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._closing import Closing
from .._errors import ModelError
from .._programs import find_program, program_environment
from .options import arguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import EngineOptions

POLL_S = 0.05


class Server(Closing):
    """superllama-server on a free port of this machine, ready when it is made; stopped by close(), at the end of a with
    block, and with this process.

    Parameters are those of LLM, and the server's own (`host`, `port`, `api_key`). `url` is the base of its API,
    `api_key` what its clients have to show: one made up for it, unless one is given.

    Raises: ModelError with the last lines of its log if it does not start.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        api_key: str | None = None,
        start_timeout: float = 600,
        **options: Unpack[EngineOptions],
    ) -> None:
        self.api_key = secrets.token_urlsafe(16) if api_key is None else api_key
        self.host, self.port = host, port or _free_port(host)
        words = arguments(os.fspath(model), dict(options))
        words += ["--host", host, "--port", str(self.port)]
        program = Path(find_program("llama-server"))
        environment = program_environment(program, os.environ)
        environment["LLAMA_API_KEY"] = self.api_key  # a command line is for everyone to see
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 # open as long as the server writes
        self._process = subprocess.Popen(
            [str(program), *words], env=environment, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log
        )
        try:
            self._wait(time.monotonic() + start_timeout)
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """The base of OpenAI's API."""
        return f"http://{self.host}:{self.port}/v1"

    @property
    def log(self) -> str:
        """What the server has written so far."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode("utf-8", "replace")

    @property
    def closed(self) -> bool:
        """Whether the process has ended."""
        return self._process.poll() is not None

    def close(self) -> None:
        """Stop it, and wait until it has ended. Closing twice is fine."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __del__(self) -> None:
        process: Any = getattr(self, "_process", None)
        if process is not None and process.poll() is None:
            self.close()

    def _wait(self, deadline: float) -> None:
        while True:
            if self.closed:
                raise ModelError(f"the server ended while it started (code {self._process.returncode}): {self._end()}")
            try:
                with urllib.request.urlopen(f"http://{self.host}:{self.port}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):  # 503 while it loads
                pass
            if time.monotonic() > deadline:
                raise ModelError(f"the server is not ready in time: {self._end()}")
            time.sleep(POLL_S)

    def _end(self) -> str:
        errors = [line for line in self.log.splitlines() if " E " in line or "error" in line.lower()]
        return "\n".join((errors or self.log.splitlines())[-5:]) or "it wrote nothing"


def _free_port(host: str) -> int:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
