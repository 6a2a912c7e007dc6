"""RPC between two machines, which are two network namespaces: a network that is cut, half open, or slow."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from netns import SERVER, Network, far_network, inside, network
from rpc_devices import NO_GPU
from test_rpc_weights import write_model

from superllama._programs import find_program, server_environment

PORT = 50052
ENDED = "Client connection closed"
TIMEOUT_S = 120  # of what comes to an end by itself in a few seconds; the machine may be busy
IMPATIENT = {"SUPERLLAMA_RPC_TIMEOUT": "4"}  # seconds, instead of 20 and more


@pytest.fixture
def net() -> Iterator[Network]:
    with network() as found:
        yield found


@contextlib.contextmanager
def serving(net: Network, log: Path, *flags: object, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    command = inside(net.server, find_program("ggml-rpc-server"), "-H", SERVER, "-p", PORT, "-t", 1, *flags)
    with log.open("ab") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=server_environment() | NO_GPU | environment)
    try:
        wait_until_it_listens(net)
        yield process
    finally:
        process.kill()
        process.wait()


def wait_until_it_listens(net: Network) -> None:
    """Not by its words, which a file gets late; nor by a connection, which would be a client's."""
    for _ in range(TIMEOUT_S * 20):
        table = subprocess.run(inside(net.server, "cat", "/proc/net/tcp"), capture_output=True, text=True).stdout
        if f":{PORT:04X} 00000000:0000 0A" in table:
            return
        time.sleep(0.05)
    raise AssertionError("the server does not listen")


def wait_for(log: Path, words: str, times: int = 1) -> None:
    for _ in range(TIMEOUT_S * 20):
        if log.exists() and log.read_text(errors="replace").count(words) >= times:
            return
        time.sleep(0.05)
    raise AssertionError(f"{words!r} never came: {log.read_text(errors='replace')}")


class Client:
    """A script on the other machine. It says what it has done, and goes on when it is told to."""

    def __init__(self, net: Network, script: str, *arguments: object, **environment: str) -> None:
        command = inside(net.client, sys.executable, "-c", script, *arguments)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=pipe, env=os.environ | NO_GPU | environment
        )

    def hears(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().decode().strip()

    def go_on(self) -> None:
        assert self.process.stdin
        self.process.stdin.write(b"\n")
        self.process.stdin.flush()

    def ends(self) -> tuple[int, str, str]:
        out, errors = self.process.communicate(timeout=TIMEOUT_S)
        return self.process.returncode, out.decode(), errors.decode()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()


DECODE = """
import sys
import superllama

def stop(what):
    print(what, flush=True)
    sys.stdin.readline()

def n_on_device():
    return [layer.tier for layer in model.layers()].count("device")

path, endpoint = sys.argv[1:3]
superllama.add_rpc_server(endpoint)
model = superllama.Model(path, dynamic_layers=True)
with superllama.Context(model, n_ctx=64, n_threads=1) as ctx:
    ctx.decode([1])
    stop(n_on_device())
    try:
        for token in range(2, 30):
            ctx.decode([token])
    except superllama.Error as e:
        print(type(e).__name__, flush=True)
stop(n_on_device())
with superllama.Context(model, n_ctx=64, n_threads=1) as ctx:
    ctx.decode([1])
    model.set_budget(vram="1GiB")
    ctx.decode([2])
    print(n_on_device())
"""


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("network") / "model.gguf")


def test_a_cable_that_is_pulled(net: Network, model_file: Path, tmp_path: Path) -> None:
    """The client's call is an error, and its layers are back. Mended, a new context works, and another client."""
    log = tmp_path / "log"
    endpoint = f"{SERVER}:{PORT}"
    with serving(net, log, **IMPATIENT), Client(net, DECODE, model_file, endpoint, **IMPATIENT) as client:
        assert client.hears() == "5"
        before = log.read_text().count(ENDED)  # those that asked who it is
        net.cut()
        client.go_on()
        assert client.hears() == "DecodeError"
        assert client.hears() == "0"
        wait_for(log, ENDED, before + 1)
        net.mend()
        client.go_on()
        status, out, errors = client.ends()
        assert (status, out) == (0, "5\n"), errors
        with Client(net, DECODE, model_file, endpoint) as next_one:
            assert next_one.hears() == "5", next_one.ends()


HALF = """
import socket, struct, sys

host, port = sys.argv[1].split(":")
with socket.create_connection((host, int(port))) as client:
    client.sendall(struct.pack("<BQ24x", 14, 24))
    answer = b""
    while len(answer) < 36:
        answer += client.recv(36)
    client.sendall(bytes.fromhex(sys.argv[2]))
    print("said", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("words", ["", "06", "06ffff000000000000"])
def test_a_client_whose_machine_is_gone(net: Network, model_file: Path, tmp_path: Path, words: str) -> None:
    """Between two messages, and in the middle of one: nothing ends its connection but the server itself."""
    log = tmp_path / "log"
    with serving(net, log, **IMPATIENT), Client(net, HALF, f"{SERVER}:{PORT}", words) as client:
        assert client.hears() == "said"
        net.cut()
        wait_for(log, ENDED)
        net.mend()
        with Client(net, DECODE, model_file, f"{SERVER}:{PORT}") as next_one:
            assert next_one.hears() == "5", next_one.ends()


def test_a_server_that_cannot_be_reached(net: Network, model_file: Path) -> None:
    """No answer at all, unlike a port where nobody listens."""
    net.cut()
    with Client(net, DECODE, model_file, f"{SERVER}:{PORT}") as client:
        status, _, errors = client.ends()
    assert status == 1
    assert f"{SERVER}:{PORT}" in errors


def test_a_far_server_on_a_slow_line(model_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 ms and 50 Mbit/s each way: nothing is taken for lost, and weights that are there need not come."""
    monkeypatch.setenv("SUPERLLAMA_CACHE", str(tmp_path / "cache"))
    tokens, n_bytes = [], []
    with far_network(delay_s=0.02, bytes_per_s=50e6 / 8) as (net, link):
        for flags in ((), ("--model-dir", model_file.parent)):
            before = link.n_bytes
            log = tmp_path / f"log{len(tokens)}"
            with serving(net, log, *flags), Client(net, GREEDY, model_file, f"{SERVER}:{PORT}") as client:
                status, out, errors = client.ends()
                assert status == 0, errors
            tokens.append(json.loads(out))
            n_bytes.append(link.n_bytes - before)
    assert tokens[0] == tokens[1]
    weights = model_file.stat().st_size
    assert n_bytes[0] > 0.9 * weights
    assert n_bytes[1] < 0.1 * weights


GREEDY = """
import json, sys
import superllama

superllama.add_rpc_server(sys.argv[2])
model = superllama.Model(sys.argv[1], dynamic_layers=True)
ctx = superllama.Context(model, n_ctx=64, n_threads=1)
tokens = [1]
for _ in range(4):
    ctx.decode(tokens[-1:])
    tokens.append(int(ctx.logits()[0].argmax()))
assert [layer.tier for layer in model.layers()].count("device") == 5
print(json.dumps(tokens))
"""


ASK = """
import sys, urllib.request

request = urllib.request.Request("http://127.0.0.1:8080" + sys.argv[1], sys.argv[2].encode() or None)
print(urllib.request.urlopen(request, timeout=100).read().decode())
"""


def test_two_commands(net: Network, model_file: Path, tmp_path: Path) -> None:
    """As docs/more-machines.md has them: a served model, some of it on the other machine."""
    secret = tmp_path / "rpc.secret"
    secret.write_text("an orange and 3 lemons\n")
    secret.chmod(0o600)
    environment = os.environ | NO_GPU | {"SUPERLLAMA_CACHE": str(tmp_path / "cache")}
    lent, log = tmp_path / "lent", tmp_path / "log"
    script = "import sys; from superllama import _programs; getattr(_programs, sys.argv.pop(1))()"
    lends = ["rpc_server", "-H", SERVER, "-p", PORT, "-t", 1, "--model-dir", model_file.parent, "--rpc-secret", secret]
    serves = ["server", "-m", model_file, "--port", 8080, "--dynamic-layers", "--rpc-secret", secret]
    serves += ["--rpc", f"{SERVER}:{PORT}", "-c", 256, "-t", 1, "--no-ui"]

    def ask(path: str, body: object = None) -> Any:
        command = inside(net.client, sys.executable, "-c", ASK, path, "" if body is None else json.dumps(body))
        done = subprocess.run(command, capture_output=True, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else None

    with contextlib.ExitStack() as running:
        for place, words, out in ((net.server, lends, lent), (net.client, serves, log)):
            file = running.enter_context(out.open("wb"))
            command = inside(place, sys.executable, "-c", script, *words)
            process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
            running.callback(process.wait)
            running.callback(process.kill)
            if place == net.server:
                wait_until_it_listens(net)
            else:
                wait_for(out, "listening")
        for _ in range(TIMEOUT_S * 10):
            if ask("/health") is not None:
                break
            time.sleep(0.1)
        answer = ask("/completion", {"prompt": "the", "n_predict": 4, "ignore_eos": True})
        assert answer["tokens_predicted"] == 4, log.read_text(errors="replace")[-2000:]
        layers = ask("/superllama")["layers"]
        assert [layer["tier"] for layer in layers].count("device") == 5
    assert "refused" not in lent.read_text(errors="replace")
