"""A server that is asked odd things: what kind of answer it gives, and whether it goes on as before."""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rounds import PATIENCE_S, Memory, Outcome, last_lines
from serving import HttpServer, http_server

# Upstream calls some requests its own error that are the client's, and says what is wrong with them. Where its parser
# does not read an answer that its grammar allowed, or where a grammar and other rules leave no token, it says so
# (docs/limits.md).
CLIENTS_ERRORS_AS_500 = re.compile(
    r"^(Failed to parse (messages|tools|tool call arguments as JSON): |'messages' is required|Multimodal data "
    r"|input \(\d+ tokens\) is too large to process|(image|audio) input is not supported|Unknown reasoning format: "
    r"|the current context does not support logits computation"
    r"|The model produced output that does not match the expected "
    r"|got exception: Unexpected empty grammar stack after accepting piece)"
)

Answer = tuple[int, bytes]


def post(path: str, body: bytes, *headers: str) -> bytes:
    """A request, as it goes over the wire."""
    head = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", "Connection: close", *headers]
    return "\r\n".join([*head, f"Content-Length: {len(body)}", "", ""]).encode() + body


def exchange(port: int, request: bytes, is_all: bool) -> Answer | None:
    """What the server answers; None if it ends the connection without. `is_all` says that nothing follows, which a
    server that streams takes for a client that is gone. Raises: TimeoutError.
    """
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connection:
        try:
            connection.sendall(request)
            if is_all:
                connection.shutdown(socket.SHUT_WR)
        except TimeoutError:
            raise
        except OSError:  # it has read enough, and may have said so
            pass
        try:
            answer = http.client.HTTPResponse(connection, method=request[:4].decode("latin-1"))
            answer.begin()
            return answer.status, answer.read()
        except (ConnectionError, http.client.HTTPException):
            return None


def verdict(answer: Answer | None, is_http: bool) -> tuple[str, str]:
    """Of an answer to a request that is HTTP, whatever it asks for; or to one that is none, where anything goes."""
    if answer is None:
        return ("no answer" if is_http else "refused"), ""
    status, body = answer
    if not is_http:
        return "ok" if status < 300 else "refused", str(status)
    if status < 300:
        if not body.startswith((b"data: ", b"event: ", b":")) and not _is_json(body):
            return "no JSON", body[:300].decode("utf-8", "replace")
        return "ok", ""
    try:
        reason = str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{status} without a reason", body[:300].decode("utf-8", "replace")
    if status < 500 or status in (501, 503) or CLIENTS_ERRORS_AS_500.search(reason):
        return ("refused" if reason else f"{status} without a reason"), f"{status}: {reason}"
    return str(status), reason


def _is_json(body: bytes) -> bool:
    try:
        json.loads(body)
    except ValueError:
        return body == b""
    return True


class Served:
    """A server on a model, for all rounds; one that ended or hangs is replaced, and the round is to blame."""

    def __init__(self, folder: Path, control: Callable[[HttpServer], object], model: Path, *flags: object) -> None:
        self._folder = folder
        self._control = control
        self._command = (model, folder / f"{model.stem}.log", *flags)
        self._server: HttpServer | None = None
        self.answer: Answer | None = None  # the last one

    def start(self) -> HttpServer:
        """The one that runs, or a new one."""
        if self._server is None:
            self._stack = contextlib.ExitStack()
            self._server = self._stack.enter_context(http_server(*self._command))
            self._memory = Memory(self._server.process.pid)
            self._expected = self._control(self._server)
        return self._server

    def ask(self, number: int, what: str, request: bytes, is_http: bool = True) -> Outcome:
        """One round: a request, and then the control."""
        server = self.start()
        begin = time.monotonic()
        try:
            self.answer = None
            self.answer = exchange(server.port, request, is_all=not is_http)
            kind, reason = verdict(self.answer, is_http)
            if server.process.poll() is None and (found := self._control(server)) != self._expected:
                kind, reason = "other answers since", f"{found!r} instead of {self._expected!r}"
        except TimeoutError:
            kind, reason = "hang", ""
        except (OSError, AssertionError, http.client.HTTPException) as e:  # of the control
            kind, reason = "no control", repr(e)
        wrong = self._memory.wrong()
        if wrong:
            kind, reason = "memory", wrong
        if kind in ("no answer", "no control"):  # a process that ends is a moment in doing so
            with contextlib.suppress(Exception):
                server.process.wait(2)
        if (code := server.process.poll()) is not None:
            kind, reason = f"ended with {code}", last_lines(server.log)
        if kind in ("hang", "memory", "no control", "other answers since") or code is not None:
            self.close()
        milliseconds = int(1000 * (time.monotonic() - begin))
        return Outcome(number, kind, self._memory.resident_mib, milliseconds, reason, what)

    def close(self) -> None:
        if self._server is not None:
            self._stack.close()
            self._server = None
