"""What crosses a connection, counted by something in between."""

from __future__ import annotations

import contextlib
import socket
import threading


class Counter:
    """Passes everything on to a server, and counts it: `sent` to the server, `received` from it, in bytes."""

    def __init__(self, endpoint: str) -> None:
        host, _, port = endpoint.rpartition(":")
        self.server = (host, int(port))
        self.sent = self.received = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.close()

    @property
    def total(self) -> int:
        return self.sent + self.received

    def allowed(self, data: bytes) -> bytes:
        """What of the server's words its client hears: all."""
        return data

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self.listener.accept()[0]
                server = socket.create_connection(self.server)
                for end in (client, server):  # messages come in parts: none waits for another's acknowledgement
                    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                for pair in ((client, server, "sent"), (server, client, "received")):
                    threading.Thread(target=self._relay, args=pair, daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket, counter: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                setattr(self, counter, getattr(self, counter) + len(data))
                target.sendall(self.allowed(data) if counter == "received" else data)
        for each in (source, target):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
