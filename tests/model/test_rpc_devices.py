"""A device behind RPC: what both sides keep, and a server that goes away. Of peers that lie: test_rpc_peers.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from lost_answers import Cut
from rpc_devices import PRELUDE, Server, rpc_server
from running import Runner
from serving import http_server

import superllama
from superllama._programs import find_program


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with rpc_server() as running:
        yield running


pytestmark = pytest.mark.usefixtures("no_gpu")


# ------------------------------------------------------------------------------- graphs that a server keeps

GRAPHS = (
    PRELUDE
    + """
model, x = open_model()
y = superllama.Context(model, n_ctx=4096, n_ubatch=64, n_threads=1)
reference = superllama.Model(path)
r = superllama.Context(reference, n_ctx=256, n_ubatch=64, n_threads=1)

def new_graphs(n):
    for i in range(n): # another number of tokens is another graph
        y.decode([1, 2][: 1 + i % 2])

def step(token):
    for ctx in (x, r):
        ctx.decode([token])
    return x.logits().tobytes() == r.logits().tobytes()

same = []
for _ in range(8):
    with superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1) as other:
        other.decode([1]) # its buffers go, and all graphs with them
    new_graphs(1) # reserves anew, so that nothing is freed in what follows
    same += [step(1), step(2), step(3)]
    new_graphs(120)
    same.append(step(4))
print(json.dumps(same))
"""
)


def test_client_and_server_count_graphs_alike(
    architectures: dict[str, Path], server: Server, run_python: Runner
) -> None:
    """A server keeps 1024 graphs and then forgets all: its client has to know when, also after buffers were freed."""
    done = run_python(GRAPHS, architectures["llama-dense"], server.endpoint, server.serving_pid())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True] * 32


# ---------------------------------------------------------------------------------- servers that go away

TESTS = Path(__file__).resolve().parents[1]
CUT = (
    f"""
import sys
sys.path[:0] = [{str(TESTS)!r}, {str(TESTS.parent)!r}]
from lost_answers import Cut

cut = Cut(sys.argv[2])
sys.argv[2] = cut.endpoint
"""
    + PRELUDE
    + """
model, ctx = open_model()
ctx.decode(model.tokenize(PROMPT))
cut.n_left = 0
what = sys.argv[4]
try:
    if what == "decode":
        ctx.decode([1])
    elif what == "state":
        ctx.state_save()
    else:
        ctx.state_save_file(what)
    print(json.dumps(ctx.logits().any().item()))
except superllama.Error as e:
    print(json.dumps([type(e).__name__, str(e)]))
"""
)


@pytest.mark.parametrize("what", ["decode", "state", "file"])
def test_an_answer_that_does_not_come(
    what: str, demo_model: Path, server: Server, run_python: Runner, tmp_path: Path
) -> None:
    """A server that goes away after the graph and before its outputs, or within a state: no zeros instead."""
    path = tmp_path / "state"
    argument = str(path) if what == "file" else what
    done = run_python(CUT, demo_model, server.endpoint, server.serving_pid(), argument)
    assert done.returncode == 0, done.stderr
    error, text = json.loads(done.stdout)
    assert error == ("DecodeError" if what == "decode" else "StateError")
    assert "RPC server at 127.0.0.1:" in text
    assert "is gone" in text
    assert not path.exists()


LOST = (
    PRELUDE
    + """
import signal, socket, subprocess

port = sys.argv[4].rpartition(":")[2]
superllama.add_rpc_server(sys.argv[4])
model, ctx = open_model(vram_budget=["50MiB", "auto"])
healthy = superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1)
healthy.decode(model.tokenize(PROMPT))
reference = greedy(healthy, 8)
on_both = {l.device for l in model.layers()} >= {"RPC1"}
ctx.decode(model.tokenize(PROMPT))
os.kill(int(sys.argv[5]), signal.SIGKILL)
try: # the process that serves ends a moment after the one that watches it
    while True:
        socket.create_connection(("127.0.0.1", int(port))).close()
        time.sleep(0.01)
except OSError:
    pass
errors = []
for _ in range(2):
    try:
        ctx.decode([1])
    except superllama.DecodeError as e:
        errors.append(str(e))
gone = "RPC1" in {l.device for l in model.layers()}
again = subprocess.Popen([sys.argv[6], "-H", "127.0.0.1", "-p", port, "-t", "1"], stdout=subprocess.DEVNULL)
time.sleep(1)
ctx.close(); healthy.close()
fresh = superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=1)
fresh.decode(model.tokenize(PROMPT))
tokens = greedy(fresh, 4)
model.set_budget(vram=["50MiB", "auto"])
tokens += greedy(fresh, 4)
back = "RPC1" in {l.device for l in model.layers()}
fresh.close(); model.close()
again.kill()
print(json.dumps({"both": on_both, "errors": errors, "gone": gone, "back": back, "same": tokens == reference}))
"""
)


def test_a_server_that_is_killed(demo_model: Path, server: Server, run_python: Runner) -> None:
    """Its contexts fail with a message; its layers are back on the host, and on it, when it is there again."""
    with rpc_server() as victim:
        done = run_python(
            LOST,
            demo_model,
            server.endpoint,
            server.serving_pid(),
            victim.endpoint,
            victim.process.pid,
            find_program("ggml-rpc-server"),
        )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["both"]
    assert len(seen["errors"]) == 2
    assert all(f"RPC server at {victim.endpoint} is gone" in error for error in seen["errors"])
    assert not seen["gone"]
    assert seen["back"]
    assert seen["same"]


def test_a_prompt_is_not_kept_from_a_device_that_is_gone(demo_model: Path, tmp_path: Path) -> None:
    """What a slot held is read for the kept prompts when another one comes: of a lost device it would be zeros."""
    with rpc_server() as first:
        port = int(first.endpoint.rpartition(":")[2])
        flags = ["-c", 512, "-np", 1, "--rpc", first.endpoint, "--mem-budget", "90MiB", "--cache-ram", 256]
        with http_server(demo_model, tmp_path / "log", *flags) as server:
            france = server.complete("The capital of France is Paris. The capital of Italy is", n_predict=12)
            assert any(layer["tier"] == "device" for layer in server.request("/superllama")[1]["layers"])
            first.process.kill()
            first.process.wait()
            status, refused = server.request("/completion", {"prompt": "Once upon a time", "n_predict": 4})
            assert (status, "is gone" in str(refused)) == (500, True), refused
            with rpc_server(port=port):
                for path in ("pause", "resume"):
                    assert server.settled(f"/superllama/{path}", {})[0] == 200
                again = server.complete("The capital of France is Paris. The capital of Italy is", n_predict=12)
                assert again["content"] == france["content"]
    assert "a prompt of 0.5 MiB is not kept: its state cannot be read" in (tmp_path / "log").read_text()


@pytest.mark.slow
def test_a_connection_that_is_lost_at_any_moment(architectures: dict[str, Path], tmp_path: Path) -> None:
    """A server's slots read and write states between two batches, too: the request fails, the server stays."""
    flags = ["-c", 256, "-np", 1, "-b", 16, "-ub", 16, "--mem-budget", "90MiB", "--checkpoint-min-step", 1]
    first, other = [10 + i % 97 for i in range(100)], [10 + i % 89 for i in range(120)]
    n_cut, statuses, said = 0, [500], ""
    with rpc_server() as device:
        while statuses[-1] == 500:
            with (
                Cut(device.endpoint) as between,
                http_server(
                    architectures["falcon-h1-dense"], tmp_path / "log", *flags, "--rpc", between.endpoint
                ) as server,
            ):
                server.complete(first, n_predict=4)
                between.n_left = n_cut
                status, answer = server.request("/completion", {"prompt": other, "n_predict": 4})
                assert status == 200 or "is gone" in str(answer), (n_cut, answer)
                assert server.request("/health")[0] == 200
                statuses.append(status)
            n_cut += 1
            said += (tmp_path / "log").read_text(errors="replace")
    assert "superllama: a checkpoint of" in said  # the server was lost while one was read


def test_no_server() -> None:
    with pytest.raises(superllama.Error, match="no RPC server at 'localhost:1'"):
        superllama.add_rpc_server("localhost:1")
    with pytest.raises(superllama.Error, match="host:port"):
        superllama.add_rpc_server("nowhere")
