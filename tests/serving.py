"""superllama-server on a tiny model, in a process of its own: what it answers, with its status, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rpc_devices import NO_GPU, free_port

from superllama._programs import find_program


@dataclass
class HttpServer:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def request(self, path: str, body: object = None, timeout: float = 300, **headers: str) -> tuple[int, Any]:
        """A status, and the JSON of the answer. `body` may be bytes, for what is no JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"} | headers
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as e:
            return e.code, json.load(e)

    def settled(self, path: str, body: object) -> tuple[int, Any]:
        """What is answered when it has been done: 202 says that it will be."""
        while (found := self.request(path, body))[0] == 202:
            pass
        return found

    def stream(self, path: str, body: object) -> list[Any]:
        """The events of an answer, as far as they hold JSON."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=300) as answer:
            lines = answer.read().decode().splitlines()
        return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]

    def complete(self, prompt: object, **body: object) -> Any:
        status, answer = self.request("/completion", {"prompt": prompt, "temperature": 0, **body})
        assert status == 200, answer
        return answer

    def refused(self, path: str, body: object) -> str:
        """The reason for which the server refuses a request as the client's mistake; it goes on afterwards."""
        status, answer = self.request(path, body)
        assert status == 400, answer
        assert self.process.poll() is None
        return str(answer["error"]["message"])


def healthy(port: int) -> bool:
    """Whether a server takes requests there."""
    with contextlib.suppress(urllib.error.URLError, ConnectionError):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10).close()
        return True
    return False


def until(there: Callable[[], bool]) -> None:
    """Wait for it, as long as a busy machine may take."""
    for _ in range(6000):
        if there():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


@contextlib.contextmanager
def running_server(log: Path, *flags: object, **environment: str) -> Iterator[HttpServer]:
    """superllama-server with these flags, on a free port."""
    port = free_port()
    command = [find_program("llama-server"), "--port", port, "--no-ui", *flags]
    with log.open("wb") as out:
        variables = os.environ | NO_GPU | environment
        process = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out, env=variables)
    try:
        while not healthy(port):
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            time.sleep(0.05)
        yield HttpServer(process, port, log)
    finally:
        process.kill()
        process.wait()


def http_server(model: Path, log: Path, *flags: object) -> contextlib.AbstractContextManager[HttpServer]:
    """The same on a model, with one thread."""
    return running_server(log, "-m", model, "-t", 1, "--no-warmup", *flags)
