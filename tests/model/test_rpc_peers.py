"""RPC peers that are not what they should be: an error for a client, the end of one connection for a server."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench.counting import Counter
from fuzz.rpc_messages import SET, Connection, Tensor, is_served, sum_graph, wait_until_served
from rpc_devices import NO_GPU, Server, rpc_server
from running import Runner
from test_rpc_weights import write_model

import superllama
from superllama._programs import find_program

# ------------------------------------------------------------------------------------- what a client meets


def http(client: socket.socket) -> None:
    client.recv(1)
    client.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")


def other_version(client: socket.socket) -> None:
    client.recv(4096)
    client.sendall(struct.pack("<Q", 28) + bytes([99, 0, 0, 0]) + bytes(24))


def silent(_client: socket.socket) -> None: ...


def half(client: socket.socket) -> None:
    client.sendall(b"\1\0\0")


def huge(client: socket.socket) -> None:
    client.recv(4096)
    client.sendall(struct.pack("<Q", 2**62))


def closes(client: socket.socket) -> None:
    client.close()


def no_devices(client: socket.socket) -> None:
    client.recv(33)
    client.sendall(struct.pack("<Q", 28) + bytes([8, 0, 0, 0]) + bytes(24))
    client.recv(9)
    client.sendall(struct.pack("<QI", 4, 2**32 - 1))


PEERS = [http, other_version, silent, half, huge, closes, no_devices]


@contextlib.contextmanager
def peer(behaviour: Callable[[socket.socket], None]) -> Iterator[tuple[str, threading.Event]]:
    """Its endpoint, and whether somebody came."""
    held: list[socket.socket] = []
    met = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    held.append(client)
                    met.set()
                    with contextlib.suppress(OSError):
                        behaviour(client)

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", met
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            for client in held:
                client.close()


@pytest.mark.parametrize("behaviour", PEERS)
def test_a_peer_that_is_no_server(behaviour: Callable[[socket.socket], None]) -> None:
    with peer(behaviour) as (endpoint, _), pytest.raises(superllama.Error, match=endpoint):
        superllama.add_rpc_server(endpoint, timeout=0.5)


@pytest.mark.parametrize("behaviour", PEERS)
def test_programs_say_what_is_wrong(tiny_model: Path, behaviour: Callable[[socket.socket], None]) -> None:
    with peer(behaviour) as (endpoint, _):
        command = [find_program("llama-completion"), "-m", tiny_model, "--rpc", endpoint, "-p", "a", "-n", "1"]
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
    assert done.returncode == 1
    assert endpoint.encode() in done.stderr


BUSY = """
import sys
import superllama

try:
    superllama.add_rpc_server(sys.argv[1], timeout=0.5)
except superllama.Error as e:
    print(e, flush=True)
sys.stdin.readline()  # until the other client is gone
print(superllama.add_rpc_server(sys.argv[1]))
"""


def test_a_server_that_is_busy() -> None:
    """In a process of its own: a server that was added stays known to the process, and goes away with the test."""
    with rpc_server() as server:
        first = Connection(server.endpoint)
        command = [sys.executable, "-c", BUSY, server.endpoint]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as client:
            assert client.stdin and client.stdout
            assert "one client at a time" in client.stdout.readline()
            first.socket.close()
            out, _ = client.communicate("gone\n", timeout=120)
    assert out == "1\n"


def test_an_interrupt_is_heard() -> None:
    script = "import superllama, sys; superllama.add_rpc_server(sys.argv[1], timeout=3600)"
    with peer(silent) as (endpoint, met):
        child = subprocess.Popen([sys.executable, "-c", script, endpoint], stderr=subprocess.PIPE)
        assert met.wait(120)
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=120)
    assert b"KeyboardInterrupt" in errors
    assert child.returncode == -signal.SIGINT


# -------------------------------------------------------------------------------------- what a server meets


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with rpc_server() as s:
        yield s


def one_tensor(connection: Connection) -> Tensor:
    return Tensor(1, *connection.buffer(4096))


def oversized(connection: Connection) -> None:
    connection.socket.sendall(bytes([6]) + struct.pack("<Q", 2**64 - 1))


def unknown(connection: Connection) -> None:
    connection.send(200, b"")


def absurd_shape(connection: Connection) -> None:
    tensor = one_tensor(connection)
    tensor.ne = tensor.nb = [2**32 - 1] * 4
    connection.send(7, tensor.pack() + struct.pack("<QQ", 0, 0))
    connection.ask(8, tensor.pack() + struct.pack("<QQ", 0, 16))


def half_a_block(connection: Connection) -> None:
    tensor = one_tensor(connection)
    tensor.type, tensor.ne[0] = 2, 33  # Q4_0 comes in blocks of 32
    connection.send(12, tensor.pack())


def below_its_buffer(connection: Connection) -> None:
    tensor = one_tensor(connection)
    tensor.ne[0], tensor.data = 0, tensor.data - 4096
    connection.ask(9, Tensor(2, *connection.buffer(4096)).pack() + tensor.pack())


def between_two_numbers(connection: Connection) -> None:
    tensor = one_tensor(connection)
    tensor.data += 1
    connection.ask(8, tensor.pack() + struct.pack("<QQ", 0, 16))


def rows_between_two_numbers(connection: Connection) -> None:
    tensor = one_tensor(connection)
    tensor.nb[1] = 130
    connection.ask(8, tensor.pack() + struct.pack("<QQ", 0, 16))


def beyond_its_end(connection: Connection) -> None:
    tensor = one_tensor(connection)
    connection.send(SET, tensor.pack() + struct.pack("<BQ", 0, 124) + bytes(8))


def read_beyond_its_end(connection: Connection) -> None:
    connection.ask(8, one_tensor(connection).pack() + struct.pack("<QQ", 120, 16))


def onto_a_part_of_itself(connection: Connection) -> None:
    buffer, base = connection.buffer(4096)
    connection.ask(9, Tensor(1, buffer, base).pack() + Tensor(2, buffer, base + 64).pack())


def no_such_operation(connection: Connection) -> None:
    tensor = one_tensor(connection)
    tensor.op = 5000
    connection.send(12, tensor.pack())


def the_same_node_twice(connection: Connection) -> None:
    tensors, nodes = sum_graph(*connection.buffer(4096))
    connection.send(10, struct.pack("<IQI", 0, 0, 2) + struct.pack("<Q", nodes[0]) * 2 + tail(tensors))


def no_node(connection: Connection) -> None:
    tensors, _ = sum_graph(*connection.buffer(4096))
    connection.send(10, struct.pack("<IQIQ", 0, 0, 1, 0) + tail(tensors))


def deep_graph(connection: Connection) -> None:
    buffer, base = connection.buffer(4096)
    tensors = [Tensor(1 + i, buffer, base) for i in range(200_000)]
    for before, tensor in itertools.pairwise(tensors):
        tensor.src[0] = before.id
    connection.send(10, struct.pack("<IQIQ", 0, 0, 1, tensors[-1].id) + tail(tensors))


def tail(tensors: list[Tensor]) -> bytes:
    return struct.pack("<I", len(tensors)) + b"".join(tensor.pack() for tensor in tensors)


CHECKED = [oversized, unknown, absurd_shape, half_a_block, below_its_buffer, no_such_operation, the_same_node_twice]
CHECKED += [no_node, deep_graph, onto_a_part_of_itself, between_two_numbers, rows_between_two_numbers]
CHECKED += [beyond_its_end, read_beyond_its_end]


@pytest.mark.parametrize("message", CHECKED)
def test_a_message_that_is_refused(server: Server, message: Callable[[Connection], None]) -> None:
    """Its connection ends, and the process that got it serves the next."""
    serving = server.serving_pid()
    connection = Connection(server.endpoint)
    with contextlib.suppress(OSError):
        message(connection)
        connection.socket.shutdown(socket.SHUT_WR)
        assert connection.socket.recv(1) == b""
    connection.socket.close()
    assert is_served(server.endpoint)
    assert server.serving_pid() == serving


def test_a_message_that_ends_the_process_ends_one_connection(server: Server) -> None:
    """Shapes that do not go together are found by the kernel, which aborts."""
    serving = server.serving_pid()
    connection = Connection(server.endpoint)
    tensors, nodes = sum_graph(*connection.buffer(4096))
    tensors[1].ne = [7, 3, 1, 1]
    connection.send(10, struct.pack("<IQIQ", 0, 0, 1, nodes[0]) + tail(tensors))
    with contextlib.suppress(OSError):
        assert connection.socket.recv(1) == b""
    connection.socket.close()
    assert wait_until_served(server.endpoint)
    assert server.serving_pid() != serving
    assert server.process.poll() is None


def test_clients_that_say_nothing_hold_up_nobody(server: Server) -> None:
    """One that is gone before it was accepted, and one that ends in the middle of its first words."""
    for words in (b"", bytes([14])):
        with socket.create_connection(server.endpoint.split(":")) as client:
            client.sendall(words)
    assert is_served(server.endpoint)


def test_a_tensor_beside_another_is_copied(server: Server) -> None:
    connection = Connection(server.endpoint)
    buffer, base = connection.buffer(4096)
    one, other = Tensor(1, buffer, base), Tensor(2, buffer, base + 128)
    connection.send(6, one.pack() + struct.pack("<BQ", 0, 0) + struct.pack("<f", 3.0) * 32)
    assert connection.ask(9, one.pack() + other.pack()) == b"\1"
    assert connection.ask(8, other.pack() + struct.pack("<QQ", 0, 128)) == struct.pack("<f", 3.0) * 32


def test_the_server_ends_when_it_is_told_to() -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with rpc_server() as server:
            assert is_served(server.endpoint)
            server.process.send_signal(number)
            assert server.process.wait(60) == -number


def test_a_server_that_cannot_start_ends() -> None:
    with rpc_server() as server:
        port = server.endpoint.rpartition(":")[2]
        done = subprocess.run([find_program("ggml-rpc-server"), "-p", port], capture_output=True, timeout=60)
    assert b"Failed to create server socket" in done.stderr


def test_graphs_in_order_are_computed(server: Server) -> None:
    """Many nodes, each of the one before: deep, but in the order in which a client sends them."""
    connection = Connection(server.endpoint)
    buffer, base = connection.buffer(4096)
    tensors, _ = sum_graph(buffer, base)
    one = tensors[0]
    chain = [tensors[2]]
    for i in range(20_000):
        tensor = Tensor(1000 + i, buffer, base + 128 * (2 + i % 2))
        tensor.op, tensor.src[0], tensor.src[1] = 2, chain[-1].id, one.id
        chain.append(tensor)
    chain[0].op, chain[0].src = 0, [0] * 10
    for tensor, value in ((one, 1.0), (chain[0], 0.0)):
        connection.send(6, tensor.pack() + struct.pack("<BQ", 0, 0) + struct.pack("<f", value) * 32)
    content = struct.pack("<IQI", 0, 0, len(chain) - 1) + b"".join(struct.pack("<Q", t.id) for t in chain[1:])
    connection.send(10, content + tail([one, *chain]))
    found = connection.ask(8, chain[-1].pack() + struct.pack("<QQ", 0, 4))
    assert struct.unpack("<f", found) == (20_000.0,)


# ------------------------------------------------------------------------------- peers that stop in the middle

SLOW_S = 3  # longer than a call on a socket waits, which is a second
IMPATIENT = {"SUPERLLAMA_RPC_TIMEOUT": "3"}  # seconds, instead of half a minute and more


def test_a_client_that_stops_in_the_middle_of_a_message() -> None:
    """It stays there, and says no more: the next one is served."""
    with rpc_server(**IMPATIENT) as server:
        first_words = b"\x0e" + struct.pack("<Q", 24) + bytes(15)
        for words in (first_words, first_words + bytes(9) + bytes([SET]) + struct.pack("<Q", 1 << 20) + bytes(100)):
            with socket.create_connection(server.endpoint.split(":")) as client:
                client.sendall(words)
                assert is_served(server.endpoint)
                client.settimeout(60)
                while client.recv(4096):
                    pass


def test_a_client_may_say_nothing_between_two_messages() -> None:
    with rpc_server(**IMPATIENT) as server:
        connection = Connection(server.endpoint)
        time.sleep(6)
        assert connection.buffer(4096)


SLOW = """
import sys
import superllama

superllama.add_rpc_server(sys.argv[1])
model = superllama.Model(sys.argv[2], dynamic_layers=True)
ctx = superllama.Context(model, n_ctx=64, n_threads=1)
for token in (1, 2):
    ctx.decode([token])
    print(int(ctx.logits()[0].argmax()), flush=True)
    sys.stdin.readline()
model.set_budget(vram=0)
model.set_budget(vram="1GiB")
ctx.decode([3])
print(int(ctx.logits()[0].argmax()), [layer.tier for layer in model.layers()].count("device"), flush=True)
"""


def test_a_server_that_takes_its_time_is_not_lost(tmp_path: Path) -> None:
    """It neither answers nor reads for longer than a call on a socket waits: as one that computes."""
    path = write_model(tmp_path / "model.gguf")  # its weights are more than a connection takes unread
    said = []
    for stops in (False, True):
        with rpc_server() as server:
            pid = server.serving_pid()
            command = [sys.executable, "-c", SLOW, server.endpoint, path]
            pipe = subprocess.PIPE
            with subprocess.Popen(
                command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=os.environ | NO_GPU
            ) as client:
                assert client.stdin and client.stdout
                lines = []
                for _ in range(2):
                    lines.append(client.stdout.readline())
                    if stops:
                        os.kill(pid, signal.SIGSTOP)
                    client.stdin.write("go on\n")
                    client.stdin.flush()
                    if stops:
                        time.sleep(SLOW_S)
                        os.kill(pid, signal.SIGCONT)
                out, errors = client.communicate(timeout=120)
                assert client.returncode == 0, errors
        said.append([*lines, out])
    assert said[0] == said[1]
    assert said[0][-1].endswith(" 5\n")


def test_a_limit_that_is_none(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with rpc_server(log=log, SUPERLLAMA_RPC_TIMEOUT="10s") as server:
        assert is_served(server.endpoint)
    assert "SUPERLLAMA_RPC_TIMEOUT=10s is no number of seconds from 1 to 999999; 600 are used" in log.read_text()


class Stalling(Counter):
    """Passes on what a server says until it is told not to, or only `n_more` bytes, and stays there."""

    n_more: int | None = None

    def allowed(self, data: bytes) -> bytes:
        if self.n_more is None:
            return data
        part = data[: self.n_more]
        self.n_more -= len(part)
        return part


STALLED = """
import logging, sys
import superllama

logging.basicConfig()
superllama.add_rpc_server(sys.argv[1])
model = superllama.Model(sys.argv[2], dynamic_layers=True)
ctx = superllama.Context(model, n_ctx=64, n_threads=1)
ctx.decode([1])
print("there", flush=True)
sys.stdin.readline()
try:
    ctx.decode([2])
except superllama.Error as e:
    print(type(e).__name__, flush=True)
"""


@pytest.mark.parametrize("n_more", [0, 3, 100])
def test_a_server_that_stops_in_the_middle_of_an_answer(tiny_model: Path, n_more: int) -> None:
    """Before it, in its length, in its content: the call that waits for it is an error."""
    with rpc_server() as server, Stalling(server.endpoint) as between:
        command = [sys.executable, "-c", STALLED, between.endpoint, tiny_model]
        environment = os.environ | NO_GPU | IMPATIENT
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment) as client:
            assert client.stdout
            assert client.stdout.readline() == "there\n"
            between.n_more = n_more
            out, errors = client.communicate("go on\n", timeout=120)
    assert out == "DecodeError\n", errors
    assert "has said nothing for" in errors


GONE = """
import os, signal, sys, time
import superllama

superllama.add_rpc_server(sys.argv[1])
assert any(device.backend == "RPC" for device in superllama.devices())
os.kill(int(sys.argv[2]), signal.SIGKILL)
time.sleep(0.2)
for _ in range(2):
    superllama.devices()
with superllama.Model(sys.argv[3], n_gpu_layers=0, devices=[]) as model:
    superllama.Context(model, n_ctx=64).decode([1])
print("alive")
"""


def test_a_server_that_went_away_is_not_the_end(run_python: Runner, tiny_model: Path) -> None:
    with rpc_server() as server:
        done = run_python(GONE, server.endpoint, server.process.pid, tiny_model)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "alive\n"
