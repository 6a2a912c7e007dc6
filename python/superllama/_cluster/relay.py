"""The address of a part, as its engine knows it: a port of the engine's own node that stays, whoever is behind it.

An engine connects to the servers that it was given when it started, and to no others. A part that starts again may be
on another node, and while it is away something has to be there. So connections pass through here, and the group says
where they go. The bytes are not looked at: a secret is proven from end to end.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from .._closing import Closing

BUFFER = 1 << 20  # a message has up to 256 KiB
CONNECT_S = 5
# A node that disappeared says nothing any more. Seconds until a question is asked, between
# two, how many of them; milliseconds for what was sent to be heard.
SILENCE = [
    (getattr(socket, name, None), value)
    for name, value in {"TCP_KEEPIDLE": 2, "TCP_KEEPINTVL": 1, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 5000}.items()
]


def address(endpoint: str) -> tuple[str, int]:
    """Host and port of HOST:PORT."""
    host, _, port = endpoint.rpartition(":")
    return host.strip("[]"), int(port)


class Relay(Closing):
    """A port on loopback. `broken` is called, by a thread of its own, when the server behind a connection went away."""

    def __init__(self, broken: Callable[[], None]) -> None:
        self._broken = broken
        self._lock = threading.Lock()
        self._target: str | None = None
        self._pairs: set[_Pair] = set()
        self._threads: set[threading.Thread] = set()
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._accepting = threading.Thread(target=self._accept, name="superllama-relay", daemon=True)
        self._accepting.start()

    @property
    def target(self) -> str | None:
        """The server behind it now."""
        return self._target

    def point_to(self, endpoint: str | None) -> None:
        """Connections go there from now on; None: to nobody. Those that there are end."""
        with self._lock:
            self._target = endpoint
            pairs = list(self._pairs)
        for pair in pairs:
            pair.end()

    def close(self) -> None:
        """End all connections, and the port."""
        with self._lock:
            self._closed = True
        self.point_to(None)
        with contextlib.suppress(OSError):  # wakes the thread that accepts
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._accepting.join()
        with self._lock:
            threads = list(self._threads)
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join()

    def _accept(self) -> None:
        while True:
            try:
                client = self._listener.accept()[0]
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            thread = threading.Thread(target=self._serve, args=(client,), name="superllama-relay", daemon=True)
            with self._lock:
                self._threads.add(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        try:
            target = self._target
            server = None if target is None else _connected(target)
            if server is None:
                client.close()
                if target is not None and target == self._target:
                    self._broken()
                return
            pair = _Pair(client, server)
            with self._lock:
                self._pairs.add(pair)
                moved = self._target != target
            if moved:
                pair.end()
            by_server = pair.run()
            with self._lock:
                self._pairs.discard(pair)
                current = self._target == target
            if by_server and current:
                self._broken()
        finally:
            with self._lock:
                self._threads.discard(threading.current_thread())


class _Pair:
    """A connection of the engine, and that to the server which answers it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._client, self._server = client, server
        self._lock = threading.Lock()
        self._ended_by: str | None = None

    def run(self) -> bool:
        """Pass on what comes until one side ends. Whether it was the server."""
        there = threading.Thread(target=self._pump, args=(self._client, self._server, "client"), daemon=True)
        there.start()
        self._pump(self._server, self._client, "server")
        there.join()
        self._client.close()
        self._server.close()
        return self._ended_by == "server"

    def end(self, who: str = "us") -> None:
        with self._lock:
            if self._ended_by is None:
                self._ended_by = who
        for side in (self._client, self._server):
            with contextlib.suppress(OSError):  # it is closed already
                side.shutdown(socket.SHUT_RDWR)

    def _pump(self, source: socket.socket, sink: socket.socket, name: str) -> None:
        buffer = memoryview(bytearray(BUFFER))
        other = "server" if name == "client" else "client"
        while True:
            try:
                n = source.recv_into(buffer)
            except OSError:
                n = 0
            if n == 0:
                return self.end(name)
            try:
                sink.sendall(buffer[:n])
            except OSError:
                return self.end(other)


def _connected(target: str) -> socket.socket | None:
    try:
        server = socket.create_connection(address(target), CONNECT_S)
    except OSError:
        return None
    server.settimeout(None)
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in SILENCE:
        if name is not None:
            server.setsockopt(socket.IPPROTO_TCP, name, value)
    return server
