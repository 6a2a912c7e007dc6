"""Several models on one budget: their servers share it, a request for one makes another give way, and the sum holds at
every moment."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from bench import make_model
from serving import HttpServer, running_server, until

from superllama import cli
from superllama._openapi import document

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="servers share memory on Linux")

MIB = 1 << 20


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> dict[str, Path]:
    """Two of about 50 MB."""
    return two_models(tmp_path_factory.mktemp("models"), demo_model, n_layer=16)


@pytest.fixture(scope="module")
def deep_models(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> dict[str, Path]:
    """Two of about 140 MB, most of it in layers."""
    return two_models(tmp_path_factory.mktemp("models"), demo_model, n_layer=64)


def two_models(folder: Path, vocabulary: Path, n_layer: int) -> dict[str, Path]:
    found = {name: folder / f"{name}.gguf" for name in ("first", "second")}
    for seed, path in enumerate(found.values(), 1):
        make_model.make_model(
            path, vocabulary, make_model.Spec(kind="dense", n_layer=n_layer, n_embd=512, n_ff=1536, seed=seed)
        )
    return found


@contextlib.contextmanager
def router(models: dict[str, Path], folder: Path, budget: str, more: str = "", *flags: object) -> Iterator[HttpServer]:
    preset = folder / "models.ini"
    common = f"version = 1\n[*]\nc = 512\nub = 64\nparallel = 1\nthreads = 1\nwarmup = false\n{more}\n"
    preset.write_text(common + "".join(f"[{name}]\nmodel = {path}\n" for name, path in models.items()))
    flags = ("--models-preset", preset, "--mem-budget", budget, *flags)
    with running_server(folder / "log", *flags, XDG_RUNTIME_DIR=str(folder), HOME=str(folder)) as server:
        try:
            yield server
        finally:
            server.process.terminate()  # its servers end with it
            server.process.wait(60)


def pool(server: HttpServer) -> dict[str, Any]:
    status, found = server.request("/superllama")
    assert status == 200, found
    jsonschema.validate(found, {"$ref": "#/components/schemas/RouterStatus", **document()})
    return dict(found["pool"])


def member(server: HttpServer, name: str) -> dict[str, Any] | None:
    return next((m for m in pool(server)["members"] if m["model"] == name), None)


def ask(server: HttpServer, name: str, prompt: str, n: int = 8) -> str:
    status, answer = server.request(
        "/v1/completions",
        {"model": name, "prompt": prompt, "max_tokens": n, "temperature": 0, "ignore_eos": True, "cache_prompt": False},
    )
    assert status == 200, answer
    return str(answer["choices"][0]["text"])


@contextlib.contextmanager
def watched(server: HttpServer) -> Iterator[list[int]]:
    """The most that was leased over the total, and what the servers really use over their leases, all the time."""
    over: list[int] = []
    done = threading.Event()

    def look() -> None:
        while not done.is_set():
            found = pool(server)
            over.append(found["leased_bytes"] - found["total_bytes"])
            for m in found["members"]:
                status, one = server.request(f"/superllama?model={m['model']}&autoload=false")
                if status == 200 and one["state"] == "ready":
                    over.append(one["memory_used_bytes"] - one["metrics"]["mem_budget_bytes"])
            time.sleep(0.02)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield over
    finally:
        done.set()
        thread.join()


def test_requests_in_turns(models: dict[str, Path], tmp_path: Path) -> None:
    with router(models, tmp_path, "110MiB") as server:
        prompts = ["the cat", "he is", "a dog and"]
        alone = {(name, p): ask(server, name, p) for name in models for p in prompts}
        assert {m["model"] for m in pool(server)["members"]} == set(models)
        both = [member(server, name) for name in models]
        assert sum(m["full_bytes"] for m in both if m) > 110 * MIB  # they do not fit together
        with watched(server) as over:
            rng = random.Random(1)
            for _ in range(40):
                name, prompt = rng.choice(list(alone))
                assert ask(server, name, prompt) == alone[name, prompt]
            with concurrent.futures.ThreadPoolExecutor(2) as both_at_once:
                for k in range(6):
                    jobs = [both_at_once.submit(ask, server, name, prompts[k % 3], 24) for name in models]
                    assert all(
                        job.result().startswith(alone[name, prompts[k % 3]])
                        for name, job in zip(models, jobs, strict=True)
                    )
        assert over and max(over) <= 0


def test_the_one_that_is_asked_for_has_the_most(models: dict[str, Path], tmp_path: Path) -> None:
    with router(models, tmp_path, "110MiB") as server:
        for name, other in (("first", "second"), ("second", "first"), ("first", "second")):
            ask(server, other, "the")
            for _ in range(3):  # until it has what it needs
                ask(server, name, "the cat", 40)
            mine, others = member(server, name), member(server, other)
            assert mine and others
            most = min(mine["full_bytes"], 110 * MIB - others["lease_bytes"])
            assert most - MIB <= mine["lease_bytes"] <= most  # a move is worth a MiB
            assert others["lease_bytes"] >= others["least_bytes"] > 0


def model_of(server: HttpServer, name: str) -> dict[str, Any]:
    """Of a server that does nothing: what it says of its model."""
    status, found = server.request(f"/superllama?model={name}")
    assert status == 200, found
    return dict(found)


def settled(server: HttpServer, name: str) -> dict[str, Any]:
    """The same, once nobody's share moves and nothing is read ahead."""
    until(lambda: not any(m["active"] for m in pool(server)["members"]))
    until(lambda: model_of(server, name)["metrics"]["prefetch_pending"] == 0)
    return model_of(server, name)


def test_a_first_pass_takes_no_more_than_its_part(deep_models: dict[str, Path], tmp_path: Path) -> None:
    with router(deep_models, tmp_path, "200MiB", "async-prefetch = true") as server:
        for name, other in (("first", "second"), ("second", "first")):
            ask(server, name, "the", 1)
            for _ in range(3):
                ask(server, other, "the cat", 40)
            before = settled(server, name)
            mine, others = member(server, name), member(server, other)
            assert mine and others and mine["lease_bytes"] <= mine["least_bytes"] + MIB < 70 * MIB
            assert others["lease_bytes"] >= 200 * MIB - mine["lease_bytes"] - MIB
            ask(server, name, "the", 1)
            after = settled(server, name)
            mine, others = member(server, name), member(server, other)
            assert mine and others
            assert all(99 * MIB <= m["lease_bytes"] <= 100 * MIB for m in (mine, others))
            # the graph ran under the new share: what was missing was read once, and the ring filled for the next one
            missing = sum(layer["bytes"] - layer["bytes_resident"] for layer in before["layers"])
            read = after["metrics"]["weight_bytes_read"] - before["metrics"]["weight_bytes_read"]
            assert read <= missing + after["metrics"]["memory_by_tag"]["ring"]
            # and the next one of that kind moves nothing
            ask(server, other, "the", 1)
            settled(server, other)
            leases = [m["lease_bytes"] for m in pool(server)["members"]]
            ask(server, name, "the", 1)
            settled(server, name)
            assert [m["lease_bytes"] for m in pool(server)["members"]] == leases


def lock_is_free(folder: Path) -> bool:
    """Of the table; a server may have stopped while it looks at it."""
    import fcntl  # there is none where these tests are skipped

    (path,) = folder.glob("superllama-*/router-*.pool")
    with path.open() as table:
        try:
            fcntl.flock(table, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_nobody_waits_for_a_share_that_does_not_come(deep_models: dict[str, Path], tmp_path: Path) -> None:
    with router(deep_models, tmp_path, "200MiB") as server:
        ask(server, "second", "the", 1)
        text = ask(server, "second", "the cat", 12)
        for _ in range(3):
            ask(server, "first", "the cat", 40)
        settled(server, "second")
        had = member(server, "first")
        assert had
        os.kill(had["pid"], signal.SIGSTOP)
        try:
            while not lock_is_free(tmp_path):
                os.kill(had["pid"], signal.SIGCONT)
                os.kill(had["pid"], signal.SIGSTOP)
            assert ask(server, "second", "the cat", 12) == text
            now = member(server, "first")
            assert now and now["lease_bytes"] == had["lease_bytes"]  # it could give nothing
        finally:
            os.kill(had["pid"], signal.SIGCONT)
        until(
            lambda: (
                (ask(server, "second", "the cat", 40), (member(server, "first") or had)["lease_bytes"])[1]
                < had["lease_bytes"]
            )
        )


def test_too_small_for_both_at_once(models: dict[str, Path], tmp_path: Path) -> None:
    """One gives all of it back for the other, and its conversation waits on disk."""
    with router(models, tmp_path, "90MiB", f"spill-dir = {tmp_path}") as server:
        prompt = "the quick brown fox " * 20
        body = {"prompt": prompt, "max_tokens": 4, "temperature": 0}
        first = server.request("/v1/completions", {"model": "first", **body})[1]
        ask(server, "second", "he")
        until(lambda: (member(server, "first") or {})["lease_bytes"] == 0)
        assert server.request("/superllama?model=first")[1]["state"] == "released"
        again = server.request("/v1/completions", {"model": "first", **body})[1]
        assert again["choices"][0]["text"] == first["choices"][0]["text"]
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 50


def test_one_that_dies_gives_back(models: dict[str, Path], tmp_path: Path) -> None:
    with router(models, tmp_path, "110MiB") as server:
        for name in models:
            ask(server, name, "the")
        dead = member(server, "first")
        assert dead
        os.kill(dead["pid"], signal.SIGKILL)
        until(lambda: member(server, "first") is None)
        assert ask(server, "second", "the cat", 40)
        assert ask(server, "first", "the")  # a new one has its part
        assert pool(server)["leased_bytes"] <= 110 * MIB


def test_the_budget_of_all_changes(models: dict[str, Path], tmp_path: Path) -> None:
    with router(models, tmp_path, "140MiB") as server:
        alone = {name: ask(server, name, "the cat", 30) for name in models}
        for budget in (110, 140, 105):
            status, found = server.settled("/superllama/budget", {"mem_budget": f"{budget}MiB"})
            assert status == 200 and found["pool"]["leased_bytes"] <= budget * MIB == found["pool"]["total_bytes"]
            assert {name: ask(server, name, "the cat", 30) for name in models} == alone
        for body, why in (
            ({"mem_budget": "1MiB"}, "needs"),
            ({"vram_budget": "1GiB"}, '"model"'),
            ({"mem_budget": "lots"}, "lots"),
        ):
            assert why in server.refused("/superllama/budget", body)
        status, refused = server.request("/superllama/budget", {"model": "first", "mem_budget": "80MiB"})
        assert status == 501 and "shares" in refused["error"]["message"]


def test_commands_of_a_router(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with router(models, tmp_path, "140MiB") as server:
        at = ["--url", f"127.0.0.1:{server.port}"]
        assert cli.main(["ps", *at]) == 0 and "none is loaded" in capsys.readouterr().out
        assert cli.main(["ps", *at, "--model", "first"]) == 1 and "not loaded" in capsys.readouterr().err
        ask(server, "first", "the")
        for asked in ("/superllama", "/superllama?model=first"):
            assert server.request(asked)[0] == 200
            assert server.request(asked, **{"Sec-Fetch-Site": "cross-site"})[0] == 403
        assert cli.main(["pause", *at, "--model", "first"]) == 0
        assert cli.main(["ps", *at]) == 0 and "first    gave its memory back" in capsys.readouterr().out
        assert cli.main(["resume", *at, "--model", "first"]) == 0
        assert cli.main(["budget", "120MiB", *at]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert "of 120 MiB" in shown[-2] and shown[-1].startswith("first ") and "works from" in shown[-1]
        assert cli.main(["top", *at]) == 0 and "of 120 MiB" in capsys.readouterr().out
        assert cli.main(["drain", *at]) == 1 and "--model NAME" in capsys.readouterr().err
