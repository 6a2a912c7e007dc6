"""Groups of nodes, as far as they need neither Ray nor a model: bundles, sessions, the relay, tied processes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rpc_devices import listens

import superllama.ray
from superllama import Error
from superllama._cluster import command
from superllama._cluster.bundles import (
    Bundle,
    check_options,
    engine_options,
    equal_bundles,
    read_bundles,
    vram_budgets,
)
from superllama._cluster.exchange import Call, Exchange, Head
from superllama._cluster.relay import Relay
from superllama._cluster.sessions import in_order, session_of
from superllama._cluster.tied import Tied
from superllama.cli import main, parser

MIB = 1 << 20

# ---------------------------------------------------------------- bundles


def test_the_memory_of_a_bundle_is_a_budget() -> None:
    bundles = read_bundles(
        [{"CPU": 4, "memory": "8GiB"}, {"memory": 512 * MIB}, {"CPU": 2.5, "memory": "1GiB", "x": 1}]
    )
    assert bundles == (Bundle(4, 8192 * MIB), Bundle(1, 512 * MIB), Bundle(2.5, 1024 * MIB, 0, {"x": 1}))
    assert bundles[2].resources() == {"CPU": 2.5, "memory": 1024 * MIB, "x": 1}
    options = engine_options(bundles, {"n_ctx": 512}, [True, True])
    assert options == {
        "n_ctx": 512,
        "n_threads": 4,
        "mem_budget": 8192 * MIB,
        "vram_budget": [512 * MIB, 1024 * MIB],
        "dynamic_layers": True,
    }
    assert engine_options(bundles[:1], {"n_threads": 3}, []) == {
        "n_threads": 3,
        "mem_budget": 8192 * MIB,
        "dynamic_layers": True,
    }


def test_a_part_that_is_away_gets_no_layers() -> None:
    bundles = read_bundles(equal_bundles(3, "1GiB", 2))
    assert vram_budgets(bundles, [True, True]) == [1024 * MIB, 1024 * MIB]
    assert vram_budgets(bundles, [False, True]) == [0, 1024 * MIB]


def test_cards_have_their_own_memory() -> None:
    bundles = read_bundles([{"GPU": 1, "memory": "1GiB"}, {"GPU": 2, "memory": "1GiB"}, {"memory": "1GiB"}])
    assert vram_budgets(bundles, [True, False]) == ["auto", "auto", 0, "auto"]
    assert vram_budgets(bundles, [False, True]) == [0, 0, 1024 * MIB, "auto"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([], "a list with one entry for each node"),
        ({"CPU": 1, "memory": "1GiB"}, "a list with one entry for each node"),
        ([{"CPU": 1}], 'bundle 0 has no "memory"'),
        ([{"memory": "1GiB"}, 5], "bundle 1 is 5"),
        ([{"memory": "50%"}], "Ray wants to know how much that is"),
        ([{"memory": "auto"}], "Ray wants to know how much that is"),
        ([{"memory": "much"}], "bundle 0 has memory 'much'"),
        ([{"memory": 1000}], "64 MiB is the least"),
        ([{"memory": "1GiB", "CPU": 0}], 'bundle 0 has "CPU": 0'),
        ([{"memory": "1GiB", "CPU": -1}], "a number from 0 on"),
        ([{"memory": "1GiB", "GPU": True}], "a number from 0 on"),
        ([{"memory": "1GiB"}] * 18, "17 devices in 18 bundles"),
    ],
)
def test_bundles_that_cannot_be(given: Any, said: str) -> None:
    with pytest.raises(Error, match=said):
        read_bundles(given)


@pytest.mark.parametrize("options", [{"mem_budget": "1GiB"}, {"rpc": "x:1"}, {"flags": {"port": 80}}])
def test_what_a_group_decides_is_no_option(options: dict[str, Any]) -> None:
    with pytest.raises(Error, match="not in a group"):
        check_options(options)
    check_options({"n_ctx": 512, "flags": {"cache_reuse": 256}}, ["--cache-reuse", "256"])
    with pytest.raises(Error, match=r"^--port: not in a group"):
        check_options({}, ["--port=80"])


# ---------------------------------------------------------------- superllama.ray and the command

NODE = {"CPU": 1, "memory": "1GiB"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"bundles": []}, "bundles is a list"),
        ({"bundles": [NODE], "replicas": 0}, "1 is the least"),
        ({"bundles": [NODE], "replicas": 2, "autoscaling": {"max_replicas": 2}}, "replicas or autoscaling"),
        ({"bundles": [NODE], "strategy": "ANY"}, "one of STRICT_SPREAD"),
        ({"bundles": [NODE], "secret": "short"}, "16 to 4096 bytes, and this one 5"),
        ({"bundles": [NODE], "vram_budget": "1GiB"}, "vram_budget: not in a group"),
    ],
)
def test_deployments_that_cannot_be(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(Error, match=said):
        superllama.ray.deployment("model.gguf", **arguments)


def test_without_ray_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(Error, match=r"pip install 'superllama\[ray\]'"):
        superllama.ray.deployment("model.gguf", bundles=[NODE])


def test_names_of_models_are_names_of_deployments() -> None:
    assert superllama.ray._name_of("/models/My model (1).gguf") == "My-model-1"
    assert superllama.ray._name_of("hf:org/repo:Q4_K_M") == "repo-Q4_K_M"


def test_the_command_line() -> None:
    line = "cluster serve m.gguf --nodes 2 --mem-per-node 8GiB -c 512 -- --cache-reuse 256 -ub 64"
    words, flags = command.without_flags(line.split())
    args = parser().parse_args(words)
    assert (args.model, args.nodes, args.mem_per_node, args.ctx_size) == ("m.gguf", 2, "8GiB", 512)
    assert flags == ["--cache-reuse", "256", "-ub", "64"]
    assert command.without_flags(["run", "x", "--", "y"]) == (["run", "x", "--", "y"], [])
    assert command._autoscaling(None, None, 4) is None
    assert command._autoscaling(None, 3, 4) == {"min_replicas": 1, "max_replicas": 3, "target_ongoing_requests": 4}
    for wrong in ((1, None), (3, 2), (-1, 2)):
        with pytest.raises(Error, match="--min-replicas"):
            command._autoscaling(*wrong, 4)


@pytest.mark.parametrize(("nodes", "said"), [("0", "one is the least"), ("2", "64 MiB is the least")])
def test_the_command_says_what_is_wrong(nodes: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cluster", "serve", "m.gguf", "--nodes", nodes, "--mem-per-node", "1MiB"]) == 1
    assert said in capsys.readouterr().err


def test_nodes_that_lack_memory_are_named() -> None:
    def node(memory: int, cpus: int, alive: bool = True) -> dict[str, Any]:
        return {"Alive": alive, "NodeManagerAddress": "10.0.0.7", "Resources": {"memory": memory * MIB, "CPU": cpus}}

    bundles = read_bundles(equal_bundles(2, "1GiB", 2))
    assert command.missing(bundles, [node(1024, 2), node(4096, 8)]) == ""
    assert command.missing(bundles, [node(4096, 8), node(999, 8), node(2048, 2, alive=False)]) == (
        "2 nodes with 1 GiB and 2 CPUs are needed, and there are 10.0.0.7 (4 GiB, 8 CPUs), 10.0.0.7 (999 MiB, 8 CPUs)"
    )
    large, small = Bundle(1, 2048 * MIB), Bundle(1, 1024 * MIB)
    assert command.missing([small, large], [node(2048, 1), node(1024, 1)]) == ""  # each where it has room
    assert "needed" in command.missing([large, large], [node(2048, 1), node(1024, 1)])


# ---------------------------------------------------------------- sessions


def session(headers: dict[str, str] | None = None, **body: Any) -> str:
    return session_of(headers or {}, json.dumps(body).encode())


def test_a_conversation_that_goes_on_is_the_same_session() -> None:
    first = [{"role": "system", "content": "S"}, {"role": "user", "content": "Hello"}]
    more = [*first, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "And now?"}]
    other = [first[0], {"role": "user", "content": "Something else"}]
    assert session(messages=first) == session(messages=more) != ""
    assert session(messages=first) != session(messages=other)
    assert session(prompt="x" * 600) == session(prompt="x" * 600 + "y")
    assert session(prompt="x") != session(prompt="y")


def test_who_says_a_session_has_that_one() -> None:
    assert session({"x-session-id": "7"}, user="me", prompt="x") == "id:7"
    assert session(user="me", prompt="x") == session(user="me", prompt="y") == "user:me"
    assert session(conversation={"id": "c1"}, input="x") == "conversation:c1"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"{}", b'{"prompt": ""}'])
def test_without_a_prompt_there_is_no_session(body: bytes) -> None:
    assert session_of({}, body) == ""


def test_only_sessions_of_a_replica_that_goes_away_move() -> None:
    replicas = [(name, name) for name in ("a", "b", "c")]
    sessions = [f"s{i}" for i in range(300)]
    before = {one: in_order(one, replicas) for one in sessions}
    homes = [order[0] for order in before.values()]
    assert all(homes.count(name) > 60 for name in ("a", "b", "c"))
    for one in sessions:
        assert in_order(one, replicas[:2]) == [name for name in before[one] if name != "c"]


# ---------------------------------------------------------------- the relay


class Echo:
    """A server that says back what it hears, and whose connections can be ended."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.connections: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection = self.listener.accept()[0]
                self.connections.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    @staticmethod
    def _serve(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := connection.recv(1 << 16):
                connection.sendall(data)

    def end(self) -> None:
        for connection in self.connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def echo() -> Iterator[Callable[[], Echo]]:
    made: list[Echo] = []

    def make() -> Echo:
        made.append(Echo())
        return made[-1]

    yield make
    for one in made:
        one.end()
        one.listener.close()


def connect(endpoint: str) -> socket.socket:
    host, port = endpoint.split(":")
    connection = socket.create_connection((host, int(port)))
    connection.settimeout(60)
    return connection


def said_back(connection: socket.socket, data: bytes) -> bytes:
    threading.Thread(target=connection.sendall, args=(data,), daemon=True).start()
    found = b""
    while len(found) < len(data):
        found += (piece := connection.recv(1 << 20))
        if not piece:
            break
    return found


def test_a_relay_passes_on_what_comes(echo: Callable[[], Echo]) -> None:
    broken = threading.Event()
    with Relay(broken.set) as relay:
        relay.point_to(echo().endpoint)
        data = os.urandom(3_000_000)
        with connect(relay.endpoint) as one, connect(relay.endpoint) as other:
            assert said_back(one, data) == data
            assert said_back(other, b"x") == b"x"
        relay.point_to(echo().endpoint)  # another server behind the same address
        with connect(relay.endpoint) as one:
            assert said_back(one, b"y") == b"y"
    assert not broken.is_set()  # all of that was our doing
    assert not listens(int(relay.endpoint.split(":")[1]))


def test_a_relay_says_that_the_server_went_away(echo: Callable[[], Echo]) -> None:
    broken = threading.Event()
    with Relay(broken.set) as relay:
        server = echo()
        relay.point_to(server.endpoint)
        with connect(relay.endpoint) as one:
            assert said_back(one, b"x") == b"x"
            server.end()
            assert one.recv(1) == b""
        assert broken.wait(60)
        broken.clear()
        relay.point_to("127.0.0.1:1")  # where nobody listens
        with connect(relay.endpoint) as one:
            assert one.recv(1) == b""
        assert broken.wait(60)


def test_a_relay_to_nobody_ends_connections(echo: Callable[[], Echo]) -> None:
    broken = threading.Event()
    with Relay(broken.set) as relay:
        relay.point_to(echo().endpoint)
        with connect(relay.endpoint) as one:
            assert said_back(one, b"x") == b"x"
            relay.point_to(None)
            assert one.recv(1) == b""
        with connect(relay.endpoint) as one:
            assert one.recv(1) == b""
    assert not broken.is_set()


# ---------------------------------------------------------------- exchanges


def answered(answer: bytes, call: Call) -> tuple[Head, list[bytes], bytes]:
    """What an exchange makes of an answer, and what the server heard."""
    heard = b""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal heard
        heard = await reader.readuntil(b"\r\n\r\n")
        heard += await reader.readexactly(len(call.body))
        writer.write(answer)
        await writer.drain()
        writer.close()

    async def ask() -> tuple[Head, list[bytes]]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            async with Exchange("127.0.0.1", port, call) as exchange:
                return exchange.head, [piece async for piece in exchange.pieces()]

    return (*asyncio.run(ask()), heard)


def test_pieces_of_an_answer_are_those_that_came() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    answer += b"5\r\ndata:\r\n3;x=y\r\n a\n\r\n0\r\n\r\n"
    call = Call("POST", "/v1/x?y=1", {"x-a": "b", "content-length": "99", "host": "there"}, b"body")
    head, pieces, heard = answered(answer, call)
    assert head == Head(200, {"content-type": "text/event-stream"})
    assert pieces == [b"data:", b" a\n"]
    assert heard.startswith(b"POST /v1/x?y=1 HTTP/1.1\r\nx-a: b\r\nHost: 127.0.0.1:")
    assert b"there" not in heard and b"Content-Length: 4\r\n" in heard and heard.endswith(b"\r\n\r\nbody")


def test_answers_with_a_length_and_without() -> None:
    call = Call("GET", "/")
    head, pieces, _ = answered(b"HTTP/1.1 404 Not Found\r\nContent-Length: 5\r\n\r\n12345", call)
    assert (head.status, b"".join(pieces)) == (404, b"12345")
    _, pieces, _ = answered(b"HTTP/1.1 200 OK\r\n\r\nall of it", call)
    assert b"".join(pieces) == b"all of it"


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n123",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n123",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\n123\r\n",
    ],
)
def test_an_answer_that_is_cut_is_an_error(answer: bytes) -> None:
    with pytest.raises(ConnectionError, match="in the middle"):
        answered(answer, Call("GET", "/"))


def test_headers_cannot_begin_another_request() -> None:
    with pytest.raises(ValueError, match="no line ends"):
        answered(b"", Call("GET", "/", {"x": "a\r\nevil: b"}))


# ---------------------------------------------------------------- processes that are tied

PARENT = """
import subprocess, sys, time
from superllama._cluster.tied import Tied
process = Tied([sys.executable, "-c", "import time; time.sleep(600)"], {})
print(process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel of Linux can end a process with its parent")
def test_a_program_ends_with_its_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    watch = os.pidfd_open(pid)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    signalled, _, _ = select.select([watch], [], [], 60)
    os.close(watch)
    assert signalled


def test_a_program_says_its_last_words(tmp_path: Path) -> None:
    script = "import sys; print('x E no room'); print('that was it'); sys.exit(3)"
    with Tied([sys.executable, "-c", script], dict(os.environ)) as process:
        assert process.wait(60)
        assert process.code == 3
        assert process.end() == "ended with code 3: x E no room"
    with Tied([sys.executable, "-c", "import time; time.sleep(600)"], dict(os.environ)) as process:
        assert process.code is None
        assert not process.wait(0.01)
    assert process.end() == "ended by signal 15"
