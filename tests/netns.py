"""Two network namespaces with a cable between them: machines that can be cut off from each other, or be far away."""

from __future__ import annotations

import collections
import contextlib
import fcntl
import os
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

SERVER, CLIENT = "10.77.0.1", "10.77.0.2"


@dataclass
class Network:
    """`server` and `client` are namespaces; in each the cable's end is called `cable`."""

    server: str
    client: str

    def cut(self) -> None:
        """Pulls the plug on the server's side: nobody is told that anything has ended."""
        _ip("-n", self.server, "link", "set", "cable", "down")

    def mend(self) -> None:
        _ip("-n", self.server, "link", "set", "cable", "up")
        # who asked for the other's address meanwhile would hear "no route" a moment from now, and all who ask with it
        for name in (self.server, self.client):
            _ip("-n", name, "neighbour", "flush", "dev", "cable")


def inside(namespace: str, *command: object) -> list[str]:
    """The command, to be run in a namespace."""
    return ["ip", "netns", "exec", namespace, *map(str, command)]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Two machines beside each other."""
    with _namespaces() as found:
        ends = ("name", "cable", "netns", found.server), ("name", "cable", "netns", found.client)
        _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
        _plug_in(found)
        yield found


@contextlib.contextmanager
def far_network(delay_s: float, bytes_per_s: float) -> Iterator[tuple[Network, FarLink]]:
    """Two machines far from each other: what is sent waits its turn, and then is on its way for so long, either way."""
    with _namespaces() as found, contextlib.ExitStack() as stack:
        try:
            ends = []
            for name in (found.server, found.client):
                end, device = _tunnel()
                stack.callback(os.close, end)
                ends.append(end)
                _ip("link", "set", device, "netns", name)
                _ip("-n", name, "link", "set", device, "name", "cable")
        except OSError as e:
            pytest.skip(f"no tunnels between network namespaces here: {e}")
        _plug_in(found)
        link = stack.enter_context(FarLink((ends[0], ends[1]), delay_s, bytes_per_s))
        yield found, link


@contextlib.contextmanager
def _namespaces() -> Iterator[Network]:
    """Skips the test where they cannot be made: no root, no iproute2."""
    if shutil.which("ip") is None:
        pytest.skip("no network namespaces here: iproute2 is not installed")
    found = Network(f"superllama-s{os.getpid()}", f"superllama-c{os.getpid()}")
    try:
        for name in (found.server, found.client):
            made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if made.returncode != 0:
                pytest.skip(f"no network namespaces here: {made.stderr.strip()}")
        yield found
    finally:
        for name in (found.server, found.client):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _plug_in(found: Network) -> None:
    for name, address in ((found.server, SERVER), (found.client, CLIENT)):
        _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
        for device in ("lo", "cable"):
            _ip("-n", name, "link", "set", device, "up")


def _tunnel() -> tuple[int, str]:
    """A network device whose packets this process reads and writes, and its name."""
    end = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        set_name, ip_packets_only = 0x400454CA, 0x1001
        done = fcntl.ioctl(end, set_name, struct.pack("16sH22x", b"superllama%d", ip_packets_only))
    except OSError:
        os.close(end)
        raise
    return end, done[:16].rstrip(b"\0").decode()


class FarLink:
    """Carries packets between two tunnels. A queue that is full drops, as a router's does."""

    QUEUE_S = 0.4

    def __init__(self, ends: tuple[int, int], delay_s: float, bytes_per_s: float) -> None:
        self.ends = ends
        self.delay_s = delay_s
        self.bytes_per_s = bytes_per_s
        self.n_bytes = 0  # that went to the other side
        self._free_at = [0.0, 0.0]  # of each direction: when the cable has taken all that waits
        self._on_its_way: tuple[collections.deque[tuple[float, bytes]], ...] = (
            collections.deque(),
            collections.deque(),
        )
        self._told, self._tell = os.pipe()
        self._thread = threading.Thread(target=self._carry)

    def __enter__(self) -> FarLink:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.write(self._tell, b"e")
        self._thread.join()
        os.close(self._told)
        os.close(self._tell)

    def _carry(self) -> None:
        while True:
            due = [packets[0][0] for packets in self._on_its_way if packets]
            wait = max(0.0, min(due) - time.monotonic()) if due else None
            ready = select.select([*self.ends, self._told], [], [], wait)[0]
            if self._told in ready:
                return
            now = time.monotonic()
            for i, packets in enumerate(self._on_its_way):
                if self.ends[i] in ready:
                    self._take(i, now)
                while packets and packets[0][0] <= now:
                    packet = packets.popleft()[1]
                    with contextlib.suppress(OSError):  # the other end is unplugged
                        self.n_bytes += os.write(self.ends[1 - i], packet)

    def _take(self, i: int, now: float) -> None:
        with contextlib.suppress(OSError):  # no more of them; or unplugged
            while True:
                packet = os.read(self.ends[i], 1 << 16)
                begin = max(now, self._free_at[i])
                if begin - now < self.QUEUE_S:
                    self._free_at[i] = begin + len(packet) / self.bytes_per_s
                    self._on_its_way[i].append((self._free_at[i] + self.delay_s, packet))
