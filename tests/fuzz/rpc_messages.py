"""Messages to an RPC server that are broken at random: it may end the connection, never more than that.

    python tests/fuzz/rpc_messages.py --seed 1 --seconds 3600

Every round is a connection: a few good messages that make a buffer and a tensor, then broken ones. New connections have
to be served all the time.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import itertools
import os
import random
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from gguf import GGUFReader
from rpc_devices import Server, rpc_server

ALLOC, GET_BASE, FREE, CLEAR, SET, SET_HASH, GET, COPY, COMPUTE = 0, 3, 4, 5, 6, 7, 8, 9, 10
MEMORY, INIT, ALLOC_SIZE, HELLO, COUNT, RECOMPUTE, MEMSET, SET_2D, GET_2D = 11, 12, 13, 14, 15, 16, 17, 18, 19
PROVE, LEFT = 200, 201  # ours: of a client that knows the server's secret, and of one that only asked
N_COMMANDS = 23  # those that talk to another server, 20 to 22, are left out: they wait for it

BUFFER_BYTES = 1 << 16  # of what a round has on the server
SERVED_EVERY = 8  # rounds: whether a new client is served well

ODD = [0, 1, 2, 7, 8, 31, 32, 255, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
OPERATIONS = {"none": 0, "add": 2}


class Tensor:
    """As the protocol describes one: 32-bit sizes and strides."""

    def __init__(self, number: int, buffer: int, data: int, ne: tuple[int, ...] = (32, 1, 1, 1)) -> None:
        self.id, self.type, self.buffer, self.data = number, 0, buffer, data
        self.ne = list(ne)
        self.nb = [4, 4 * ne[0], 4 * ne[0] * ne[1], 4 * ne[0] * ne[1] * ne[2]]
        self.op, self.flags = 0, 16
        self.src = [0] * 10
        self.view_src = self.view_offset = 0
        self.use_count = 1
        self.name = b"t"

    def pack(self) -> bytes:
        head = struct.pack("<QIQ4I4II", self.id, self.type, self.buffer, *self.ne, *self.nb, self.op)
        tail = struct.pack("<i10QQQQ", self.flags, *self.src, self.view_src, self.view_offset, self.data)
        return head + bytes(64) + tail + self.name.ljust(64, b"\0") + struct.pack("<i", self.use_count)

    def broken(self, r: random.Random) -> Tensor:
        """One of its fields at an odd value."""
        field = r.choice(["id", "type", "buffer", "data", "op", "view_src", "view_offset", "ne", "nb", "src", "name"])
        if field in ("ne", "nb"):
            getattr(self, field)[r.randrange(4)] = r.choice(ODD) % 2**32
        elif field == "src":
            self.src[r.randrange(10)] = r.choice([self.id, *ODD])
        elif field == "name":
            self.name = b"x" * 64
        else:
            value = r.choice([*ODD, self.data - 1, self.data + 1, self.data + 4096]) % 2**64
            setattr(self, field, value % 2**32 if field in ("type", "op") else value)
        return self


class Connection:
    """A client, which proves that it knows the secret where there is one. What it is asked may find the connection
    ended: ConnectionError."""

    def __init__(self, endpoint: str, secret: bytes | None = None) -> None:
        host, _, port = endpoint.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), 60)
        self.hello = self.ask(HELLO, bytes(24))
        if secret is not None:
            mine = os.urandom(32)
            its = self.ask(PROVE, mine)
            self.ask(PROVE, proof(secret, "client", its, mine))

    def send(self, command: int, content: bytes, size: int | None = None) -> None:
        self.socket.sendall(bytes([command]) + struct.pack("<Q", len(content) if size is None else size) + content)

    def ask(self, command: int, content: bytes) -> bytes:
        self.send(command, content)
        return self.receive(struct.unpack("<Q", self.receive(8))[0])

    def receive(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.socket.recv(min(size - len(data), 1 << 20))
            if not more:
                raise ConnectionError("ended")
            data += more
        return data

    def buffer(self, size: int) -> tuple[int, int]:
        """Its name, and where it begins."""
        name = struct.unpack("<QQ", self.ask(ALLOC, struct.pack("<IQ", 0, size)))[0]
        return name, struct.unpack("<Q", self.ask(GET_BASE, struct.pack("<Q", name)))[0]


def proof(secret: bytes, of: str, first: bytes, second: bytes) -> bytes:
    return hmac.new(secret, b"superllama rpc 1 " + of.encode() + first + second, hashlib.sha256).digest()


def graph(r: random.Random, tensors: list[Tensor], nodes: list[int]) -> bytes:
    return b"".join(
        [
            struct.pack("<IQI", 0, r.choice([0, 0, 5]), len(nodes)),
            *(struct.pack("<Q", node) for node in nodes),
            struct.pack("<I", len(tensors)),
            *(tensor.pack() for tensor in tensors),
        ]
    )


def sum_graph(buffer: int, base: int) -> tuple[list[Tensor], list[int]]:
    """c = a + b: the smallest graph that computes."""
    a, b, c = (Tensor(100 + i, buffer, base + 128 * i) for i in range(3))
    c.op, c.src[0], c.src[1] = OPERATIONS["add"], a.id, b.id
    return [a, b, c], [c.id]


def fnv(data: bytes) -> int:
    """The hash by which weights are asked for."""
    value = 0xCBF29CE484222325
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 % 2**64
    return value


def hashes_in(folder: Path) -> list[int]:
    """Of weights that a server with these files has: some that have room in a buffer."""
    tensors = [t for path in sorted(folder.glob("*.gguf")) for t in GGUFReader(path).tensors]
    fit = [t for t in tensors if 1 << 14 <= t.n_bytes <= BUFFER_BYTES and t.n_elements == max(t.shape) * min(t.shape)]
    return [fnv(t.data.tobytes()) for t in fit[:8]]


def message(r: random.Random, buffer: int, base: int, hashes: Sequence[int] = ()) -> tuple[int, bytes]:
    """A command and its content, of which something is odd."""
    tensor = Tensor(100, buffer, base).broken(r) if r.random() < 0.7 else Tensor(100, buffer, base)
    odd = lambda: r.choice([*ODD, 128, 4096]) % 2**64  # noqa: E731
    shape = lambda: (r.choice([32, 4096, 8192, 16384]), 1, 1, 1)  # noqa: E731
    hashed = lambda: r.choice([tensor, Tensor(100, buffer, base, shape())])  # noqa: E731
    command = r.choice([ALLOC, GET_BASE, FREE, CLEAR, SET, SET_HASH, GET, COPY, COMPUTE, COMPUTE, COMPUTE, MEMORY])
    if r.random() < 0.4:
        command = r.choice([INIT, ALLOC_SIZE, RECOMPUTE, MEMSET, SET_2D, GET_2D])
    contents: dict[int, Callable[[], bytes]] = {
        ALLOC: lambda: struct.pack("<IQ", r.choice([0, 1, 2**32 - 1]), r.choice([0, 1, 4096, 2**62, 2**64 - 1])),
        GET_BASE: lambda: struct.pack("<Q", r.choice([buffer, odd()])),
        FREE: lambda: struct.pack("<Q", odd()),
        CLEAR: lambda: struct.pack("<QB", r.choice([buffer, odd()]), 1),
        SET: lambda: tensor.pack() + struct.pack("<BQ", r.choice([0, 1]), odd()) + bytes(r.choice([0, 1, 128, 8192])),
        SET_HASH: lambda: hashed().pack() + struct.pack("<QQ", r.choice([0, 0, odd()]), r.choice([odd(), *hashes])),
        GET: lambda: tensor.pack() + struct.pack("<QQ", odd(), odd()),
        COPY: lambda: tensor.pack() + Tensor(101, buffer, base + 128, (r.choice([0, 32, 64]), 1, 1, 1)).pack(),
        MEMORY: lambda: struct.pack("<I", odd() % 2**32),
        INIT: lambda: tensor.pack(),
        ALLOC_SIZE: lambda: struct.pack("<I", r.choice([0, 9])) + tensor.pack() * 11,
        RECOMPUTE: lambda: struct.pack("<IQ", r.choice([0, 9]), r.choice([5, odd()])),
        MEMSET: lambda: tensor.pack() + struct.pack("<QQB", odd(), odd(), 1),
        SET_2D: lambda: tensor.pack() + struct.pack("<QQQQ", odd(), odd(), odd(), odd()) + bytes(256),
        GET_2D: lambda: tensor.pack() + struct.pack("<QQQQ", odd(), odd(), odd(), odd()),
        COMPUTE: lambda: broken_graph(r, buffer, base),
    }
    return command, contents[command]()


def broken_graph(r: random.Random, buffer: int, base: int) -> bytes:
    tensors, nodes = sum_graph(buffer, base)
    kind = r.randrange(6)
    if kind == 0:
        r.choice(tensors).broken(r)
    elif kind == 1:
        nodes = r.choice([[], [0], nodes * 2, [*nodes, 77], [t.id for t in tensors] * 3])
    elif kind == 2:  # each of the one before it, to any depth
        tensors = [Tensor(1000 + i, buffer, base) for i in range(r.choice([10, 5000, 100_000]))]
        for before, tensor in itertools.pairwise(tensors):
            tensor.src[0] = before.id
        nodes = [tensors[-1].id]
    elif kind == 3:  # from itself
        tensors[2].src[0] = tensors[2].id
    content = bytearray(graph(r, tensors, nodes))
    if kind == 4:
        content[12:16] = struct.pack("<I", r.choice(ODD) % 2**32)  # how many nodes
    if kind == 5:
        at = r.randrange(len(content))
        content[at] = r.randrange(256)
    return bytes(content)


def broken_proof(r: random.Random, connection: Connection) -> None:
    """Of one that knows nothing, or not to the end; no answer is awaited that need not come."""
    for _ in range(r.randrange(1, 4)):
        content = r.randbytes(r.choice([0, 1, 31, 32, 32, 33, 4096]))
        connection.send(
            r.choice([PROVE, PROVE, PROVE, LEFT, HELLO, COUNT, SET, r.randrange(256)]),
            content,
            size=r.choice([None, None, None, 32, *ODD]),
        )


def one_round(r: random.Random, endpoint: str, secret: bytes | None = None, hashes: Sequence[int] = ()) -> int:
    """The number of broken messages that were sent."""
    n = 0
    if secret is not None and r.random() < 0.5:
        connection = Connection(endpoint)
        try:
            broken_proof(r, connection)
            connection.socket.shutdown(socket.SHUT_WR)
            while connection.socket.recv(1 << 20):
                pass
        except OSError:
            pass
        finally:
            connection.socket.close()
        return 1
    connection = Connection(endpoint, secret)
    try:
        buffer, base = connection.buffer(BUFFER_BYTES)
        for _ in range(r.randrange(1, 5)):
            command, content = message(r, buffer, base, hashes)
            n += 1
            match r.randrange(6):
                case 0:
                    connection.send(command, content, size=r.choice(ODD))
                case 1:
                    connection.send(command, content[: r.randrange(len(content) + 1)])
                case 2:
                    connection.send(r.choice([N_COMMANDS, 24, 100, PROVE, LEFT, 255]), content)
                case _:
                    connection.send(command, content)
        connection.socket.shutdown(socket.SHUT_WR)
        while connection.socket.recv(1 << 20):  # until the server ends it
            pass
    except OSError:  # it did
        pass
    finally:
        connection.socket.close()
    return n


def is_served(endpoint: str, secret: bytes | None = None) -> bool:
    """Whether a new client is answered, and a graph computes what it should."""
    try:
        connection = Connection(endpoint, secret)
    except OSError:
        return False
    try:
        buffer, base = connection.buffer(4096)
        tensors, nodes = sum_graph(buffer, base)
        for tensor, value in zip(tensors[:2], (1.5, 2.0), strict=True):
            connection.send(SET, tensor.pack() + struct.pack("<BQ", 0, 0) + struct.pack("<f", value) * 32)
        connection.send(COMPUTE, graph(random.Random(1), tensors, nodes))
        found = connection.ask(GET, tensors[2].pack() + struct.pack("<QQ", 0, 128))
        return found == struct.pack("<f", 3.5) * 32
    except OSError:
        return False
    finally:
        connection.socket.close()


def wait_until_served(endpoint: str, secret: bytes | None = None) -> bool:
    """A process that ended is replaced: the first tries may find nobody."""
    for _ in range(600):
        if is_served(endpoint, secret):
            return True
        time.sleep(0.05)
    return False


def fuzz(
    server: Server,
    seed: int,
    go_on: Callable[[int], bool],
    secret: bytes | None = None,
    hashes: Sequence[int] = (),
) -> int:
    """Rounds until `go_on` says no of the messages so far, which are returned; every round has a seed of its own, which
    an error names."""
    n = n_messages = 0
    while go_on(n_messages):
        try:
            n_messages += one_round(random.Random(f"{seed}/{n}"), server.endpoint, secret, hashes)
        except OSError as e:  # the process that serves was being replaced
            assert wait_until_served(server.endpoint, secret), f"round {n} of seed {seed}: {e}"
        if n % SERVED_EVERY == 0:
            assert wait_until_served(server.endpoint, secret), f"nobody is served after round {n} of seed {seed}"
        assert server.process.poll() is None, f"the server ended in round {n} of seed {seed}"
        n += 1
    assert wait_until_served(server.endpoint, secret), f"nobody is served after seed {seed}"
    return n_messages


def main() -> None:
    parser = argparse.ArgumentParser(description="Broken messages to an RPC server.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--messages", type=int, default=10**9, help="end after so many")
    parser.add_argument("--model-dir", type=Path, help="of the server")
    parser.add_argument("--secret", type=Path, help="a file with a secret of the server")
    parser.add_argument("--program", type=Path, help="another server than the one that is installed")
    parser.add_argument("--log", type=Path, help="the server's words")
    arguments = parser.parse_args()
    end = time.monotonic() + arguments.seconds
    flags = ["--model-dir", arguments.model_dir] if arguments.model_dir else []
    flags += ["--rpc-secret", arguments.secret] if arguments.secret else []
    secret = arguments.secret.read_bytes().rstrip(b"\r\n") if arguments.secret else None
    with rpc_server(1, *flags, log=arguments.log, program=arguments.program) as server:
        go_on = lambda n: time.monotonic() < end and n < arguments.messages  # noqa: E731
        hashes = hashes_in(arguments.model_dir) if arguments.model_dir else []
        print("messages:", fuzz(server, arguments.seed, go_on, secret, hashes))


if __name__ == "__main__":
    main()
