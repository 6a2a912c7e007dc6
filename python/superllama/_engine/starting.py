"""What starting a program that serves takes: a port, the time until it is ready, and what it says where it never is."""

from __future__ import annotations

import socket
import time
import urllib.request
from collections.abc import Callable

from .._errors import ModelError

POLL_S = 0.05
ASK_S = 5  # for an answer that needs no model; one that takes longer is asked for again


def free_port(host: str, wanted: int = 0) -> int:
    """A port of `host` that nobody listens on: `wanted` if that is one. Raises: OSError."""
    for port in (wanted, 0):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the one before may linger
            try:
                probe.bind((host, port))
            except OSError:
                if port == 0:
                    raise
                continue
            return int(probe.getsockname()[1])
    raise AssertionError("port 0 is bound, or an error")


def wait_until_healthy(
    url: str,
    deadline: float,
    *,
    ended: Callable[[], str | None],
    late: Callable[[], str],
    pause: Callable[[float], object] = time.sleep,
) -> None:
    """Until the server at `url` has loaded its model; `deadline` is of time.monotonic(). `ended` says why it never
    will, None as long as it may; `late` why it is not ready in time; both are texts of errors.

    Raises: ModelError with one of them.
    """
    while True:
        if (why := ended()) is not None:
            raise ModelError(why)
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=ASK_S):
                return
        except OSError:  # 503 while it loads
            pass
        if time.monotonic() > deadline:
            raise ModelError(late())
        pause(POLL_S)


def last_words(log: str) -> str:
    """Of what a program has written: its errors, or else its end."""
    lines = log.splitlines()
    errors = [line for line in lines if " E " in line or "error" in line.lower()]
    return "\n".join((errors or lines)[-5:]) or "it wrote nothing"
