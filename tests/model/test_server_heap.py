"""What requests leave free in the server's heap goes back to the system: it would lie outside of every budget."""

from __future__ import annotations

import random
import sys
import threading
from pathlib import Path

import pytest
from serving import HttpServer, http_server, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and asks glibc")

MIB = 1 << 20


def anonymous_bytes(server: HttpServer) -> int:
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon")) << 10


def test_free_memory_goes_back(tiny_model: Path, tmp_path: Path) -> None:
    """Many clients at once, each with bodies of all sizes that end up as nothing."""

    def ask(seed: int) -> None:
        sizes = random.Random(seed)
        for _ in range(12):
            words = ["a" * sizes.randrange(1, 200) for _ in range(sizes.randrange(1, 30_000))]
            status, _ = server.request("/tokenize", {"content": words[0], "more": words})
            assert status == 200

    with http_server(tiny_model, tmp_path / "log", "-c", 512) as server:
        before = anonymous_bytes(server)
        clients = [threading.Thread(target=ask, args=(i,)) for i in range(16)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        until(lambda: anonymous_bytes(server) < before + 64 * MIB)
