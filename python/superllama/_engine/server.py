"""Server: superllama-server as a process beside this one, for clients of OpenAI's API."""

from __future__ import annotations

import os
import secrets
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._closing import Closing
from .._programs import find_program, program_environment
from .options import arguments
from .starting import free_port, last_words, wait_until_healthy

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import EngineOptions


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
        self.host, self.port = host, port or free_port(host)
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
            wait_until_healthy(
                self.url.removesuffix("/v1"),
                time.monotonic() + start_timeout,
                ended=self._ended,
                late=lambda: f"the server is not ready in time: {last_words(self.log)}",
            )
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

    def _ended(self) -> str | None:
        if not self.closed:
            return None
        return f"the server ended while it started (code {self._process.returncode}): {last_words(self.log)}"
