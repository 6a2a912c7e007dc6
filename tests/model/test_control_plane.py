"""Budgets over HTTP: they change while clients stream, all or nothing, and only for who may."""

from __future__ import annotations

import concurrent.futures
import json
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from bench import make_model
from dynamic import layout
from serving import HttpServer, http_server

from superllama import cli

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")

MIB = 1 << 20
# one slot, for which clients wait: a random model's next token hangs on how many are computed at once
FLAGS = ["-c", 1024, "-np", 1, "-ub", 64, "--async-prefetch"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Path:
    """About 50 MB, so that a third of it is something."""
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    make_model.make_model(path, demo_model, make_model.Spec(kind="dense", n_layer=16, n_embd=512, n_ff=1536))
    return path


@pytest.fixture(scope="module")
def server(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    with http_server(model, tmp_path_factory.mktemp("log") / "log", *FLAGS, "--mem-budget", "200MiB") as found:
        yield found


def test_what_a_server_says_of_its_memory(server: HttpServer) -> None:
    server.complete("a", n_predict=2)
    status, found = server.request("/superllama")
    assert status == 200 and found["dynamic_layers"]
    assert found["memory_used_bytes"] == sum(found["metrics"]["memory_by_tag"].values())
    assert found["metrics"]["mem_budget_bytes"] == 200 * MIB >= found["memory_used_bytes"]
    assert [layer["tier"] for layer in found["layers"]] == ["host"] * len(found["layers"])
    assert {"index", "bytes", "bytes_resident", "loads", "evictions", "device"} < set(found["layers"][0])


def test_budgets_change_while_clients_stream(model: Path, server: HttpServer) -> None:
    plan = layout(model, {"n_ctx": 1024, "n_ubatch": 64})
    full = 200 * MIB
    small = plan.mem_least_bytes + (plan.mem_full_bytes - plan.mem_least_bytes) // 3 + 4 * MIB
    prompts = [f"{word} is it" for word in ("the", "he", "you", "that")]
    body = {"n_predict": 100, "temperature": 0, "ignore_eos": True, "cache_prompt": False, "stream": True}
    alone = [text_of(server, prompt, body) for prompt in prompts]

    peaks: list[int] = []
    over = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(lambda p: [text_of(server, p, body) for _ in range(3)], p) for p in prompts]
        for k in range(20):
            budget = small if k % 2 == 0 else full
            status, found = server.request("/superllama/budget", {"mem_budget": budget})
            assert status in (200, 202), found
            assert found["metrics"]["mem_budget_bytes"] == budget
            if status == 200:
                peaks.append(found["memory_used_bytes"] - budget)
        over.set()
        texts = [job.result() for job in running]
    assert peaks and max(peaks) <= 0
    assert texts == [[text] * 3 for text in alone]
    _, found = server.request("/superllama/budget", {"mem_budget": small})  # nobody asks for anything: at once
    assert found["memory_used_bytes"] <= small
    assert "disk" in [layer["tier"] for layer in found["layers"]]
    server.request("/superllama/budget", {"mem_budget": full})


def text_of(server: HttpServer, prompt: str, body: dict[str, Any]) -> str:
    return "".join(event["content"] for event in server.stream("/completion", {"prompt": prompt, **body}))


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({}, "mem_budget"),
        ([], "object"),
        ({"budget": "1GiB"}, '"budget"'),
        ({"mem_budget": "1MiB"}, "least that works"),
        ({"mem_budget": 1}, "least that works"),
        ({"mem_budget": -1}, "bytes"),
        ({"mem_budget": 1.5}, "bytes"),
        ({"mem_budget": None}, "bytes"),
        ({"mem_budget": "0"}, "mem_budget"),
        ({"mem_budget": "lots"}, "lots"),
        ({"mem_budget": "150MiB", "vram_budget": "1GiB"}, "device"),
        ({"vram_budget": ["1GiB", "x"]}, "x"),
        (b"{", "parse"),
    ],
    ids=str,
)
def test_what_cannot_be_changes_nothing(server: HttpServer, body: Any, why: str) -> None:
    assert why in server.refused("/superllama/budget", body)
    _, found = server.request("/superllama")
    assert found["metrics"]["mem_budget_bytes"] == 200 * MIB


def test_other_sites_may_not(server: HttpServer) -> None:
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200), ("none", 200)):
        headers = {"Sec-Fetch-Site": site, "Content-Type": "text/plain"}
        assert server.request("/superllama/budget", {"mem_budget": "200MiB"}, **headers)[0] == status, site
        found, answer = server.request("/superllama", **headers)
        assert found == status and ("metrics" in answer) == (status == 200), site
        page = urllib.request.Request(f"http://127.0.0.1:{server.port}/superllama/ui", headers=headers)
        with urllib.request.urlopen(page, timeout=60) as shown:  # a link to it is followed
            assert b"superllama" in shown.read()


def test_a_key_is_asked_for_and_a_server_without_budgets_says_so(
    tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with http_server(tiny_model, tmp_path / "log", "-c", 256, "--api-key", "k") as server:
        for path, body in (("/superllama", None), ("/superllama/budget", {"mem_budget": "1GiB"})):
            assert server.request(path, body)[0] == 401
        url = f"http://127.0.0.1:{server.port}"
        assert cli.main(["ps", "--url", url]) == 1
        assert "--api-key" in capsys.readouterr().err
        assert cli.main(["ps", "--url", url, "--api-key", "k"]) == 0
        assert "no dynamic layers" in capsys.readouterr().out
        assert cli.main(["budget", "1GiB", "--url", url, "--api-key", "k"]) == 1
        assert "without dynamic layers" in capsys.readouterr().err


def test_commands(server: HttpServer, capsys: pytest.CaptureFixture[str]) -> None:
    url = f"http://127.0.0.1:{server.port}"
    assert cli.main(["ps", "--url", url]) == 0
    shown = capsys.readouterr().out
    assert "of 200 MiB" in shown and "█" in shown and max(map(len, shown.splitlines())) <= 90
    assert cli.main(["budget", "150MiB", "--url", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["mem_budget_bytes"] == 150 * MIB
    assert cli.main(["budget", "200MiB", "--url", url + "/v1"]) == 0
    assert cli.main(["budget", "--url", url]) == 2
    assert cli.main(["budget", "1MiB", "--url", url]) == 1
    assert "least that works" in capsys.readouterr().err
    assert cli.main(["ps", "--url", "http://127.0.0.1:9"]) == 1
