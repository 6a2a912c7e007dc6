"""`superllama top` of a real server, on a terminal: what it shows is what the server says, and keys change it."""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import make_model
from dynamic import layout
from serving import HttpServer, http_server
from terminal import Terminal, under_terminal

from superllama._look.amounts import memory

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")

TOP = [sys.executable, "-m", "superllama", "top"]


@pytest.fixture(scope="module")
def model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("top") / "m.gguf"
    make_model.make_model(path, demo_model, make_model.Spec(kind="dense", n_layer=64, n_embd=512, n_ff=1536))
    return path


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[HttpServer]:
    """With a budget at which many of its layers stream, also after a step up or down."""
    plan = layout(model, {"n_ctx": 1024, "n_ubatch": 64})
    budget = (plan.mem_least_bytes + plan.mem_full_bytes) // 2
    flags = ["-c", 1024, "-np", 1, "-ub", 64, "--async-prefetch", "--mem-budget", budget, "--cache-ram", 0]
    with http_server(model, model.with_name("log"), *flags, "--metrics-file", model.with_name("m.jsonl")) as found:
        found.complete("a", n_predict=2)
        yield found


@pytest.fixture
def top(server: HttpServer) -> Iterator[Terminal]:
    with under_terminal([*TOP, "--url", f"http://127.0.0.1:{server.port}"]) as terminal:
        terminal.wait_for("stream from disk")
        yield terminal
        terminal.press("q")
        assert terminal.end() == 0
        assert terminal.modes() == terminal.before


def budget_of(server: HttpServer) -> int:
    return int(server.request("/superllama")[1]["metrics"]["mem_budget_bytes"])


def set_budget(server: HttpServer, n_bytes: int) -> None:
    assert server.request("/superllama/budget", {"mem_budget": n_bytes})[0] == 200


def test_the_layers_of_a_server(server: HttpServer, top: Terminal) -> None:
    picture = top.picture()
    found = server.request("/superllama")[1]
    row = re.search(r"layers  0 (\S+)", picture)
    assert row is not None
    assert [mark == "█" for mark in row[1]] == [layer["tier"] == "host" for layer in found["layers"]]
    assert set(map(len, picture.splitlines())) == {80} and len(picture.splitlines()) == 24


def test_keys_change_the_budget_while_it_computes(server: HttpServer, top: Terminal) -> None:
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            server.complete("the", n_predict=20, ignore_eos=True)

    client = threading.Thread(target=ask)
    client.start()
    try:
        top.wait_for("computing")
        before = budget_of(server)
        for key, factor in (("-", 0.9), ("+", 1.1)):
            wanted = round(before * factor)
            top.press(key)
            top.wait_for(f"budget {memory(wanted)}: ready")
            assert budget_of(server) == wanted
            server.request("/superllama/budget", {"mem_budget": before})
            top.wait_for(f"of {memory(before)}\n")
    finally:
        done.set()
        client.join()


def test_what_cannot_be_is_said_in_the_last_line(server: HttpServer, top: Terminal) -> None:
    before = budget_of(server)
    least = re.search(r"least that works is (\d+) MiB", server.refused("/superllama/budget", {"mem_budget": 1}))
    assert least is not None
    low = round((int(least[1]) << 20) * 1.05)
    set_budget(server, low)
    top.wait_for(f"of {memory(low)}\n")
    top.press("-")
    assert "least" in "".join(top.wait_for("too small").splitlines()[-2:])
    assert budget_of(server) == low
    set_budget(server, before)


def test_p_pauses_and_resumes(server: HttpServer, top: Terminal) -> None:
    top.press("p")
    assert "given back" in top.wait_for("pause: paused")
    assert server.request("/superllama")[1]["state"] == "paused"
    top.press("p")
    top.wait_for("resume: ready")
    assert server.complete("a", n_predict=2)["content"]


def test_other_ways_to_name_it(server: HttpServer) -> None:
    metrics = server.log.with_name("m.jsonl")
    ways: list[tuple[list[object], str]] = [
        (["--pid", server.process.pid], f"http://127.0.0.1:{server.port}"),
        (["--metrics", metrics], str(metrics)[:40]),
    ]
    for arguments, name in ways:
        with under_terminal([*TOP, *arguments]) as terminal:
            assert name in terminal.wait_for("stream from disk")
