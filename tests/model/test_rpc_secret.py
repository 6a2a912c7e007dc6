"""A secret that an RPC server shares with its clients: strangers are refused on both sides, and nobody sees it."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench.counting import Counter
from fuzz.rpc_messages import COUNT, LEFT, PROVE, Connection
from fuzz.rpc_messages import proof as proof_of
from rpc_devices import NO_GPU, Server, rpc_server
from running import Runner

import superllama
from superllama._programs import find_program, secret_first

SECRET = b"an orange and 3 lemons"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("secrets")
    found = {}
    for name, content in {"right": SECRET + b"\n", "wrong": b"another secret, as long", "short": b"0123456789"}.items():
        found[name] = folder / name
        found[name].write_bytes(content)
        found[name].chmod(0o600)
    return found


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("log") / "log"


@pytest.fixture(scope="module")
def server(files: dict[str, Path], log: Path) -> Iterator[Server]:
    with rpc_server(1, "--rpc-secret", files["right"], log=log) as running:
        yield running


def proof(of: str, first: bytes, second: bytes, secret: bytes = SECRET) -> bytes:
    return proof_of(secret, of, first, second)


def proven(server: Server, secret: bytes = SECRET, number: bytes = b"n" * 32) -> tuple[Connection, bytes, bytes]:
    """A client that proves itself, the server's random number, its answer."""
    connection = Connection(server.endpoint)
    its = connection.ask(PROVE, number)
    return connection, its, connection.ask(PROVE, proof("client", its, number, secret))


# ------------------------------------------------------------------------------------------ what a server does


def test_a_client_that_knows_it_is_served(server: Server) -> None:
    connection, its, answer = proven(server)
    assert answer == b"\1" + proof("server", b"n" * 32, its)
    assert struct.unpack("<I", connection.ask(COUNT, b"")) == (1,)


def test_every_number_is_new(server: Server) -> None:
    """So a proof that was overheard proves nothing."""
    assert len({proven(server)[1] for _ in range(4)}) == 4


def foreign(connection: Connection) -> None:
    """As upstream's client goes on, were it not for the version."""
    connection.ask(COUNT, b"")


def replayed(connection: Connection) -> None:
    its = connection.ask(PROVE, b"n" * 32)
    connection.ask(PROVE, proof("client", bytes(32), b"n" * 32))
    assert its != bytes(32)


def reflected(connection: Connection) -> None:
    """Its own number, and what it would prove itself."""
    its = connection.ask(PROVE, b"n" * 32)
    connection.ask(PROVE, proof("server", its, its))


def has_none(connection: Connection) -> None:
    connection.send(PROVE, b"")


def half(connection: Connection) -> None:
    connection.send(PROVE, b"n" * 16, size=32)


def long(connection: Connection) -> None:
    connection.send(PROVE, b"n" * 64)


STRANGERS: dict[Callable[[Connection], None], str] = {
    foreign: "it does not prove that it knows the secret",
    replayed: "it has another secret",
    reflected: "it has another secret",
    has_none: "it has no secret",
    half: "it did not say to the end",
    long: "it does not prove that it knows the secret",
}


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_is_refused(server: Server, log: Path, stranger: Callable[[Connection], None]) -> None:
    before = log.read_text().count(STRANGERS[stranger])
    connection = Connection(server.endpoint)
    with contextlib.suppress(OSError):
        stranger(connection)
        connection.socket.shutdown(socket.SHUT_WR)
        connection.send(COUNT, b"")
    with contextlib.suppress(OSError):  # closed, or reset where something was left unread
        while connection.socket.recv(4096):
            pass
    connection.socket.close()
    proven(server)  # the next one is served, when the log has it
    said = log.read_text()
    assert said.count(STRANGERS[stranger]) == before + 1
    assert "a client at 127.0.0.1 is refused" in said


def test_the_version_that_others_see_is_nobodys(server: Server) -> None:
    """Upstream's client ends at once, saying that the versions differ."""
    client = Connection(server.endpoint)
    assert client.hello[0] >= 0x80
    assert client.hello[3] == 2
    client.socket.sendall(bytes([LEFT]))


# ------------------------------------------------------------------------------------------ what a client does

USE = """
import sys
import superllama

secret = sys.argv[2] or None
try:
    superllama.add_rpc_server(sys.argv[1], rpc_secret=secret)
except superllama.Error as e:
    sys.exit(str(e))
with superllama.Model(sys.argv[3], n_gpu_layers=99) as model:
    context = superllama.Context(model, n_ctx=64)
    context.decode([1])
    print(context.logits()[0].argmax())
"""


def use(run_python: Runner, endpoint: str, secret: Path | str, model: Path) -> subprocess.CompletedProcess[str]:
    return run_python(USE, endpoint, secret, model)


def test_both_know_it(server: Server, files: dict[str, Path], tiny_model: Path, run_python: Runner) -> None:
    with rpc_server() as open_server:
        expected = use(run_python, open_server.endpoint, "", tiny_model)
    done = use(run_python, server.endpoint, files["right"], tiny_model)
    assert (done.returncode, done.stdout) == (0, expected.stdout), done.stderr
    assert expected.stdout


def test_only_the_server_has_one(server: Server, files: dict[str, Path], tiny_model: Path, run_python: Runner) -> None:
    done = use(run_python, server.endpoint, "", tiny_model)
    assert server.endpoint in done.stderr
    assert "none was given here" in done.stderr
    done = use(run_python, server.endpoint, files["wrong"], tiny_model)
    assert "it refuses the shared secret that was given here" in done.stderr


def test_only_the_client_has_one(files: dict[str, Path], tiny_model: Path, run_python: Runner) -> None:
    with rpc_server() as server:
        done = use(run_python, server.endpoint, files["right"], tiny_model)
    assert "it asks for no secret, and one was given here" in done.stderr


@pytest.mark.parametrize(
    ("name", "said"), [("short", "it has 10 bytes"), ("nowhere", "No such file"), ("", "no regular file")]
)
def test_a_file_that_is_no_secret(files: dict[str, Path], name: str, said: str) -> None:
    path = files["right"].parent / name
    with pytest.raises(superllama.Error, match=said):
        superllama.add_rpc_server("127.0.0.1:9", rpc_secret=path)
    done = subprocess.run([find_program("ggml-rpc-server"), "--rpc-secret", path], capture_output=True, timeout=60)
    assert said.encode() in done.stderr


@contextlib.contextmanager
def impostor(answer: bytes) -> Iterator[str]:
    """Says that it wants the secret, sends a number, and then what it has instead of a proof."""

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):  # the first one only asks who is here, and goes
                client.recv(33, socket.MSG_WAITALL)
                client.sendall(struct.pack("<Q4B24x", 28, 8 | 0x80, 0, 0, 2))
                client.recv(41, socket.MSG_WAITALL)
                client.sendall(struct.pack("<Q", 32) + b"x" * 32)
                client.recv(41, socket.MSG_WAITALL)
                client.sendall(struct.pack("<Q", 33) + answer)
                client.recv(1)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def test_a_server_that_only_says_so_is_not_used(files: dict[str, Path]) -> None:
    with (
        impostor(b"\1" + bytes(32)) as endpoint,
        pytest.raises(superllama.Error, match="does not know the shared secret"),
    ):
        superllama.add_rpc_server(endpoint, rpc_secret=files["right"])


def test_nothing_of_it_is_seen(
    server: Server, files: dict[str, Path], tiny_model: Path, run_python: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = bytearray()
    relay = Counter._relay

    class Recorded:
        def __init__(self, source: socket.socket) -> None:
            self.source = source

        def recv(self, n: int) -> bytes:
            data = self.source.recv(n)
            seen.extend(data)
            return data

        def shutdown(self, how: int) -> None:
            self.source.shutdown(how)

    monkeypatch.setattr(Counter, "_relay", lambda self, a, b, name: relay(self, Recorded(a), b, name))  # type: ignore
    with Counter(server.endpoint) as between:
        done = use(run_python, between.endpoint, files["right"], tiny_model)
    assert done.returncode == 0, done.stderr
    assert len(seen) > 100_000
    assert SECRET not in seen
    assert hashlib.sha256(SECRET).digest() not in seen


def test_programs(server: Server, files: dict[str, Path], tiny_model: Path) -> None:
    """In any order by our commands, which put it first; by a variable too."""
    run = [sys.executable, "-c", "import sys; from superllama import _programs; _programs.completion()"]
    flags = ["-m", tiny_model, "--rpc", server.endpoint, "-p", "a", "-n", "1", "-no-cnv"]
    for words, variables, status in (
        ([*flags, "--rpc-secret", files["right"]], {}, 0),
        (flags, {"LLAMA_ARG_RPC_SECRET": str(files["right"])}, 0),
        ([*flags, "--rpc-secret", files["wrong"]], {}, 1),
        (flags, {}, 1),
    ):
        environment = os.environ | NO_GPU | variables
        command = [*run, *map(str, words)]
        done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=120, env=environment)
        assert done.returncode == status, done.stderr[-2000:]
        assert (b"secret" in done.stderr) == (status == 1)


def test_the_secret_goes_first() -> None:
    words = ["--rpc", "a:1", "--rpc-secret", "f", "-m", "x"]
    assert secret_first(words) == ["--rpc-secret", "f", "--rpc", "a:1", "-m", "x"]
    assert secret_first(["-m", "x"]) == ["-m", "x"]
