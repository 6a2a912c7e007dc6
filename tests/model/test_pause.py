"""A server's memory, given back and taken again: conversations wait on disk, requests hear why they wait or do not."""

from __future__ import annotations

import concurrent.futures
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from serving import HttpServer, http_server, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")

MIB = 1 << 20
FLAGS = ["-c", 2048, "-ub", 64]
TEXT = "the quick brown fox jumps over the lazy dog and " * 12


def state(server: HttpServer) -> str:
    return str(server.request("/superllama")[1]["state"])


def post(server: HttpServer, action: str) -> Any:
    status, found = server.settled(f"/superllama/{action}", {})
    assert status == 200, found
    return found


def next_tokens(server: HttpServer, prompt: str, **body: Any) -> tuple[list[int], int]:
    """Greedy tokens, and how many of the prompt were there already."""
    answer = server.complete(prompt, n_predict=8, ignore_eos=True, return_tokens=True, **body)
    return answer["tokens"], answer["timings"]["cache_n"]


@pytest.fixture(scope="module")
def spill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("spill")


@pytest.fixture(scope="module")
def server(demo_model: Path, spill: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    flags = [*FLAGS, "--mem-budget", "250MiB", "--spill-dir", spill, "-np", 2, "--metrics"]
    with http_server(demo_model, tmp_path_factory.mktemp("log") / "log", *flags) as found:
        yield found


def test_memory_goes_and_comes_back_with_the_conversation(server: HttpServer, spill: Path) -> None:
    process = psutil.Process(server.process.pid)
    next_tokens(server, TEXT, id_slot=1)
    expected, _ = next_tokens(server, TEXT + " a cat", id_slot=1)  # as it will be asked for again: what follows is new
    next_tokens(server, TEXT, id_slot=1)
    budget = server.request("/superllama/budget", {"mem_budget": "240MiB"})[1]["metrics"]["mem_budget_bytes"]

    found = post(server, "pause")
    assert found["state"] == "paused" and found["layers"] == [] and found["memory_used_bytes"] == 0
    assert "metrics" not in found
    assert process.memory_info().rss < 150 * MIB
    assert list(spill.rglob("*")) == []  # a file without a name leaves nothing
    for path in ("/completion", "/tokenize", "/v1/chat/completions", "/slots/0?action=erase"):
        status, refused = server.request(path, {"prompt": "a", "content": "a", "messages": []})
        assert status == 503 and "/superllama/resume" in refused["error"]["message"], path
    assert server.request("/health")[0] == 503
    status, refused = server.request("/superllama/budget", {"mem_budget": "1GiB"})
    assert status == 503 and "resume" in refused["error"]["message"]
    assert server.request("/props")[0] == server.request("/v1/models")[0] == 200
    assert post(server, "pause")["state"] == "paused"  # twice is fine

    found = post(server, "resume")
    assert found["state"] == "ready" and found["metrics"]["mem_budget_bytes"] == budget
    assert server.request("/health") == (200, {"status": "ok"})
    tokens, n_cached = next_tokens(server, TEXT + " a cat", id_slot=1)
    assert tokens == expected and n_cached >= 100
    assert list(spill.rglob("*")) == []


def test_what_runs_ends_first(server: HttpServer) -> None:
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        events = pool.submit(
            server.stream, "/completion", {"prompt": "the", "n_predict": 150, "ignore_eos": True, "stream": True}
        )
        until(lambda: server.request("/superllama")[1]["requests_in_flight"] > 0)
        asked = pool.submit(post, server, "pause")
        until(lambda: state(server) in ("pausing", "paused"))
        assert server.request("/completion", {"prompt": "a"})[0] == 503  # nobody new
        assert asked.result()["state"] == "paused"
        assert events.result()[-1]["tokens_predicted"] == 150
    post(server, "resume")


def test_draining_takes_nobody_new_and_keeps_the_model(server: HttpServer) -> None:
    found = post(server, "drain")
    assert found["state"] == "draining" and found["requests_in_flight"] == 0 and found["layers"]
    status, refused = server.request("/completion", {"prompt": "a"})
    assert status == 503 and "drains" in refused["error"]["message"]
    status, health = server.request("/health")
    assert status == 503 and health["status"] == "draining"
    assert post(server, "resume")["state"] == "ready"
    assert next_tokens(server, "the")[0]


def test_pages_of_other_sites_may_not(server: HttpServer) -> None:
    for action in ("pause", "resume", "drain"):
        assert server.request(f"/superllama/{action}", {}, **{"Sec-Fetch-Site": "cross-site"})[0] == 403
    assert state(server) == "ready"


def test_nobody_asks_for_a_while(demo_model: Path, tmp_path: Path) -> None:
    with http_server(demo_model, tmp_path / "log", *FLAGS, "--idle-release", 1, "-np", 1) as server:
        expected, _ = next_tokens(server, TEXT + " a cat")
        next_tokens(server, TEXT)
        until(lambda: state(server) == "released")
        assert server.request("/health") == (200, {"status": "ok", "state": "released"})
        process = psutil.Process(server.process.pid)
        until(lambda: process.memory_info().rss < 150 * MIB)  # "released" is also what is on its way out
        with concurrent.futures.ThreadPoolExecutor(4) as pool:  # one of them wakes it for all
            others = [pool.submit(server.request, "/tokenize", {"content": "a"}) for _ in range(3)]
            tokens, n_cached = next_tokens(server, TEXT + " a cat")
            assert all(job.result()[0] == 200 for job in others)
        assert tokens == expected and n_cached >= 100


def test_prompts_beside_the_slots_are_kept_too(tiny_model: Path, tmp_path: Path) -> None:
    with http_server(tiny_model, tmp_path / "log", "-c", 1024, "-np", 1, "--mem-budget", "64MiB") as server:
        first, second = "the " * 100, "he " * 120
        next_tokens(server, first)
        next_tokens(server, second)  # has the slot now; the first one is kept beside it
        post(server, "pause")
        post(server, "resume")
        assert next_tokens(server, first + "cat")[1] >= 90
        assert next_tokens(server, second + "cat")[1] >= 90


def test_a_model_that_is_gone_for_a_while(demo_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.symlink_to(demo_model)
    with http_server(model, tmp_path / "log", *FLAGS) as server:
        post(server, "pause")
        model.rename(tmp_path / "elsewhere")
        assert server.request("/superllama/resume", {})[0] == 202
        until(lambda: state(server) == "degraded")
        status, found = server.request("/completion", {"prompt": "a"})
        assert status == 503 and "could not be loaded again" in found["error"]["message"]
        assert server.request("/health")[0] == 503
        (tmp_path / "elsewhere").rename(model)
        until(lambda: state(server) == "ready")
        assert next_tokens(server, "the")[0]

        post(server, "pause")
        model.unlink()
        server.request("/superllama/resume", {})
        os.kill(server.process.pid, signal.SIGTERM)  # heard, though the model does not come
        server.process.wait(60)


@pytest.mark.parametrize("when", ["ready", "paused"])
def test_the_end_of_a_server(tiny_model: Path, tmp_path: Path, when: str) -> None:
    with http_server(tiny_model, tmp_path / "log", "-c", 512) as server:
        server.complete("a", n_predict=1)  # the handlers of signals are there once it is answered
        if when == "paused":
            post(server, "pause")
        os.kill(server.process.pid, signal.SIGTERM)
        assert server.process.wait(60) == 0


def test_another_way_to_sleep_is_not_mixed_with_this_one(tiny_model: Path, tmp_path: Path) -> None:
    with http_server(tiny_model, tmp_path / "log", "-c", 512, "--sleep-idle-seconds", 600) as server:
        status, refused = server.request("/superllama/pause", {})
        assert status == 501 and "--idle-release" in refused["error"]["message"]
