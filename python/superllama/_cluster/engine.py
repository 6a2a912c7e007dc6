"""superllama-server of a group: started, asked for its state, told budgets, made to load its model again."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import _control
from .._closing import Closing
from .._engine.options import arguments
from .._engine.starting import free_port, wait_until_healthy
from .._errors import Error
from .._look.status import state_of
from .._programs import find_program, program_environment, secret_first
from .part import secret_file
from .tied import Tied

HOST = "127.0.0.1"
FAILED = re.compile(r" E llama_init_from_model: failed to initialize the context: (.*)")


class Engine(Closing):
    """The server, whose devices are the RPC servers at `endpoints`. `options` are those of superllama.Server, `words`
    more of its command line.

    Raises: ModelError with the last lines of its log where it does not start.
    """

    def __init__(
        self,
        model: str,
        endpoints: Sequence[str],
        secret: str,
        options: Mapping[str, Any],
        words: Sequence[str] = (),
        *,
        start_timeout: float = 3600,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="superllama-group-")
        try:
            self.key = secrets.token_urlsafe(16)
            self.port = free_port(HOST)
            command = [*arguments(model, options), *words, "--host", HOST, "--port", str(self.port)]
            if endpoints:
                file = secret_file(Path(self._folder.name), secret)
                command += ["--rpc-secret", str(file), "--rpc", ",".join(endpoints)]
            program = find_program("llama-server")
            environment = program_environment(program, os.environ)
            environment["LLAMA_API_KEY"] = self.key
            self.process = Tied([str(program), *secret_first(command)], environment)
        except BaseException:
            self._folder.cleanup()
            raise
        try:
            wait_until_healthy(
                self.url,
                time.monotonic() + start_timeout,
                ended=self._not_started,
                late=lambda: f"the engine of a group is not ready in time: {self.process.last_words()}",
                pause=self.process.wait,
            )
        except BaseException:
            self.close()
            raise

    @property
    def url(self) -> str:
        """Where it is."""
        return f"http://{HOST}:{self.port}"

    @property
    def failure(self) -> str | None:
        """Why it has ended; None while it runs."""
        if self.process.code is None:
            return None
        return f"the engine {self.process.end()}"

    def status(self) -> dict[str, Any]:
        """GET /superllama. Raises: Error."""
        return _control.status(self.url, self.key)

    def set_vram(self, budgets: Sequence[int | str]) -> None:
        """Budgets of its devices. Raises: Error."""
        _control.set_budget(self.url, self.key, {"vram_budget": list(budgets)})

    def pause(self) -> str:
        """Take nothing new, and free the model when what runs has ended; the state, after ten seconds at most."""
        return state_of(_control.pause(self.url, self.key))

    def resume(self) -> tuple[str, str]:
        """Load the model; the state, after ten seconds at most, and why it cannot be loaded, "" as long as it can."""
        found = _control.resume(self.url, self.key)
        state = state_of(found)
        if state != "degraded":
            return state, ""
        said = FAILED.findall(self.process.words())  # the reason of the state may be that of an earlier failure
        return state, said[-1] if said else str(found.get("reason", "it says no reason"))

    def try_one_token(self) -> str:
        """What it answers to the smallest request: "" where it can compute, else why not."""
        data = b'{"prompt": [0], "n_predict": 1, "cache_prompt": false}'
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(f"{self.url}/completion", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=_control.TIMEOUT_S) as answer:
                answer.read()
            return ""
        except urllib.error.HTTPError as e:
            return e.read().decode("utf-8", "replace")
        except OSError as e:
            raise Error(f"the engine does not answer: {e}") from e

    def close(self) -> None:
        """End it. Twice is fine."""
        self.process.close()
        self._folder.cleanup()

    def _not_started(self) -> str | None:
        why = self.failure
        return None if why is None else f"the engine of a group does not start: {why}"
