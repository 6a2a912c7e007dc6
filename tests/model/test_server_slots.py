"""Requests beside each other in one server, adapters, cancellation, the end of the server, files of slots."""

from __future__ import annotations

import concurrent.futures
import json
import random
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import tiny_model as tiny
from serving import HttpServer, http_server, until

PROMPT = "the cat that was on it " * 8


def numbers(n: int, seed: int = 1) -> list[int]:
    generator = random.Random(seed)
    return [1] + [generator.randrange(3, 290) for _ in range(n - 1)]


# ---------------------------------------------------------------------------------------------- adapters


def test_no_prefix_of_another_adapter(tiny_model: Path, tmp_path: Path) -> None:
    loras = [tiny.write_lora(tmp_path / f"{i}.gguf", seed=i) for i in (2, 9)]
    flags = ["--lora", ",".join(map(str, loras)), "--lora-init-without-apply", "-np", 1, "-c", 512]
    sets: list[dict[str, Any]] = [{}, {"lora": [{"id": 0, "scale": 1.0}]}, {"lora": [{"id": 1, "scale": 1.0}]}]
    with http_server(tiny_model, tmp_path / "log", *flags) as server:

        def ask(cached: bool, which: dict[str, Any]) -> tuple[str, int]:
            answer = server.complete(PROMPT, n_predict=12, cache_prompt=cached, **which)
            return answer["content"], answer["timings"]["cache_n"]

        expected = [ask(False, which)[0] for which in sets]
        assert len(set(expected)) == 3
        server.complete("zz", n_predict=1)
        for i in (1, 0, 2, 1, 0, 2):
            assert ask(True, sets[i])[0] == expected[i]
            content, reused = ask(True, sets[i])  # and its own prefix is still reused
            assert content == expected[i]
            assert reused > 100

        for scale, i in ((1.0, 1), (0.0, 0)):
            server.request("/lora-adapters", [{"id": 0, "scale": scale}])
            assert ask(True, {})[0] == expected[i]


def test_adapters_that_are_only_loaded(tiny_model: Path, tmp_path: Path) -> None:
    lora = tiny.write_lora(tmp_path / "lora.gguf", seed=2)
    with http_server(tiny_model, tmp_path / "log", "-c", 512) as server:
        plain = server.complete(PROMPT, n_predict=12)["content"]
    with http_server(tiny_model, tmp_path / "log", "-c", 512, "--lora", lora, "--lora-init-without-apply") as server:
        for scale in (3e38, -10001, 1e30):
            assert "scale" in server.refused("/completion", {"prompt": "a", "lora": [{"id": 0, "scale": scale}]})
        assert server.complete(PROMPT, n_predict=12)["content"] == plain


# ------------------------------------------------------------------------------------- a context that is full


def test_one_of_those_that_do_not_fit_fails(tiny_model: Path, tmp_path: Path) -> None:
    flags = ["-np", 4, "-c", 512, "-kvu", "-b", 64, "-ub", 64]
    flags += ["-fa", "off", "-ctk", "f32", "-ctv", "f32"]  # so that a batch with others has the same text
    with http_server(tiny_model, tmp_path / "log", *flags) as server:
        alone = [server.complete(numbers(200, i), n_predict=30, ignore_eos=True)["content"] for i in range(4)]

        def ask(i: int) -> tuple[int, Any]:
            body = {"prompt": numbers(200, i), "n_predict": 30, "temperature": 0, "ignore_eos": True}
            return server.request("/completion", body)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(ask, range(4)))
        good = [i for i, (status, _) in enumerate(answers) if status == 200]
        assert len(good) >= 2  # two fit, and more where they came one after the other
        for i, (status, answer) in enumerate(answers):
            if i in good:
                assert answer["content"] == alone[i]
            else:
                assert status == 503
                assert "the context is full" in answer["error"]["message"]
                assert "200 tokens" in answer["error"]["message"]
        assert server.complete(numbers(200), n_predict=2)["content"] is not None


# ------------------------------------------------------------------------------------- clients that are gone


def slots(server: HttpServer) -> Any:
    return server.request("/slots")[1]


def start_prompt(server: HttpServer, prompt: list[int]) -> socket.socket:
    body = json.dumps({"prompt": prompt, "n_predict": 5, "stream": True, "return_progress": True}).encode()
    client = socket.create_connection(("127.0.0.1", server.port))
    head = (
        f"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    client.sendall(head.encode() + body)
    return client


LONG = ["-np", 1, "-c", 8192, "-b", 8192, "-ub", 64, "--slots", "--override-kv", "llama.context_length=int:8192"]


@pytest.fixture(scope="module")
def long_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One in which a prompt takes long enough to be interrupted: every ubatch is a step of its own."""
    return tiny.write_zeros(tmp_path_factory.mktemp("long") / "long.gguf", 512, 8, 2048)


def test_a_client_that_is_gone(long_model: Path, tmp_path: Path) -> None:
    """The slot is released within a ubatch or two, not after the batch of 8192 tokens."""
    with http_server(long_model, tmp_path / "log", *LONG) as server:
        client = start_prompt(server, numbers(8000))
        until(lambda: bool(slots(server)[0]["is_processing"]))
        client.close()
        assert server.complete(numbers(3), n_predict=1)["tokens_evaluated"] == 3
    log = (tmp_path / "log").read_text(errors="replace")
    released = [line for line in log.splitlines() if "stop processing" in line]
    n_tokens = int(released[0].rpartition("n_tokens = ")[2].split(",")[0])
    assert n_tokens < 8000


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_server_is_told_to_end(long_model: Path, tmp_path: Path, number: signal.Signals) -> None:
    """With a client that stays, and another request that waits for the slot."""
    with http_server(long_model, tmp_path / "log", *LONG) as server:
        clients = [start_prompt(server, numbers(8000, i)) for i in range(2)]
        until(lambda: bool(slots(server)[0]["is_processing"]))
        server.process.send_signal(number)
        assert server.process.wait(120) == 0
        for client in clients:
            client.close()
    log = (tmp_path / "log").read_text(errors="replace")
    assert "prompt eval" not in log  # it was not waited for


# ------------------------------------------------------------------------------------------- files of slots


def test_files_that_are_no_slots(tiny_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slots"
    folder.mkdir()
    with http_server(tiny_model, tmp_path / "log", "-np", 1, "-c", 512, "--slot-save-path", folder) as server:
        expected = server.complete(PROMPT, n_predict=8)["content"]
        assert server.request("/slots/0?action=save", {"filename": "good"})[0] == 200
        good = (folder / "good").read_bytes()
        generator = random.Random(3)
        bad = [b"", good[:7], good[: len(good) // 2], good[:-1], b"\0" * len(good), bytes(range(256)) * 40]
        bad += [good[:i] + b"\xff" * 8 + good[i + 8 :] for i in range(0, 120, 4)]  # sizes, counts, tokens
        for _ in range(40):
            at = generator.randrange(len(good))
            bad.append(good[:at] + bytes([generator.randrange(256)]) + good[at + 1 :])
        for i, content in enumerate(bad):
            (folder / "bad").write_bytes(content)
            status, answer = server.request("/slots/0?action=restore", {"filename": "bad"})
            assert status in (200, 400, 500), (i, answer)
            assert status == 200 or answer["error"]["message"], i
            assert server.process.poll() is None, i
        assert server.request("/slots/0?action=restore", {"filename": "good"})[0] == 200
        again = server.complete(PROMPT, n_predict=8)
        assert again["content"] == expected
        assert again["timings"]["cache_n"] > 100


@pytest.mark.parametrize(("n_checkpoints", "status"), [(4, 200), (0, 501)])
def test_a_restored_slot_of_a_window(
    architectures: dict[str, Path], tmp_path: Path, n_checkpoints: int, status: int
) -> None:
    """Where the cache holds a window only, a file without a checkpoint before its end is of no use: that is said."""
    flags = ["-np", 1, "-c", 1024, "--ctx-checkpoints", n_checkpoints, "--slot-save-path", tmp_path]
    prompt = [1] + [(i * 37 + i * i) % 90 + 5 for i in range(100)]
    with http_server(architectures["gemma3-dense"], tmp_path / "log", *flags) as server:
        expected = server.complete(prompt, n_predict=8)["content"]
        assert server.request("/slots/0?action=save", {"filename": "x"})[0] == 200
    with http_server(architectures["gemma3-dense"], tmp_path / "log2", *flags) as server:
        found, answer = server.request("/slots/0?action=restore", {"filename": "x"})
        assert found == status, answer
        assert status == 200 or "checkpoint" in answer["error"]["message"]
        again = server.complete(prompt, n_predict=8)
        assert again["content"] == expected
        assert (again["timings"]["cache_n"] > 0) == (status == 200)


def test_a_server_that_slept(tiny_model: Path, tmp_path: Path) -> None:
    """What it keeps beside its slots was charged to a context that is gone since."""
    log = tmp_path / "log"
    flags = ["-np", 1, "-c", 256, "--sleep-idle-seconds", 1, "--mem-budget", "1GiB"]
    with http_server(tiny_model, log, *flags) as server:
        prompts = [[3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]]
        texts = [server.complete(prompt, n_predict=4)["content"] for prompt in prompts]
        for n_times in (1, 2):
            deadline = time.monotonic() + 120
            while log.read_text(errors="replace").count("server is entering sleeping state") < n_times:
                assert time.monotonic() < deadline, "the server does not go to sleep"
                time.sleep(0.1)
            assert [server.complete(prompt, n_predict=4)["content"] for prompt in prompts] == texts
