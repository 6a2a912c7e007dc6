"""llama-server with slots, prompt cache, context checkpoints and a draft model: the same text with pages as without."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from superllama._programs import find_program

N_SLOTS, N_CONVERSATIONS = 3, 5
FLAGS = [
    "-np",
    N_SLOTS,
    "-c",
    1024 * N_SLOTS,
    "-t",
    1,
    "--no-ui",
    "--cache-ram",
    64,
    "--ctx-checkpoints",
    4,
    "-fa",
    "on",
]
FLAGS += ["--slot-prompt-similarity", 0, "--spec-type", "draft-simple", "--spec-draft-n-max", 4, "--context-shift"]


@contextlib.contextmanager
def server(model: Path, log: Path, *flags: object) -> Iterator[str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [
        find_program("llama-server"),
        "-m",
        model,
        "-md",
        model,
        "--port",
        url.rpartition(":")[2],
        *FLAGS,
        *flags,
    ]
    with log.open("w") as out:
        child = subprocess.Popen(list(map(str, command)), stdout=out, stderr=out)
    try:
        while True:
            assert child.poll() is None, log.read_text()[-3000:]
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{url}/health", timeout=10)
                break
            time.sleep(0.05)
        yield url
    finally:
        child.terminate()
        child.wait(60)


def post(url: str, **body: object) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def talk(url: str) -> tuple[list[str], int]:
    """More conversations than slots, in turns: their slots are swapped with the prompt cache. Returns what was
    answered, and how many drafted tokens were accepted."""
    texts = [
        f"Story {i}. " + "The river ran past the old mill and the town. " * (10 + 3 * i) for i in range(N_CONVERSATIONS)
    ]
    answers, accepted = [], 0
    for turn in range(2):
        for i in [0, 1, 2, 3, 4] if turn % 2 == 0 else [1, 4, 0, 2, 3]:
            got = post(f"{url}/completion", prompt=texts[i], n_predict=16, temperature=0, id_slot=i % N_SLOTS)
            answers.append(got["content"])
            accepted += got["timings"].get("draft_n_accepted", 0)
            texts[i] += got["content"] + f" And then, for the time number {turn}, it was told again."
    long = post(f"{url}/completion", prompt=texts[0], n_predict=300, temperature=0, id_slot=0, ignore_eos=True)
    return [*answers, long["content"]], accepted


@pytest.mark.slow
def test_the_same_text(demo_model: Path, tmp_path: Path) -> None:
    with server(demo_model, tmp_path / "plain.log") as url:
        expected, _ = talk(url)
    metrics = tmp_path / "metrics.jsonl"
    paging = ["--paged-kv", "--kv-page-size", 64, "--kv-budget", "9MiB", "--spill-dir", tmp_path, "--async-prefetch"]
    with server(demo_model, tmp_path / "paged.log", *paging, "--metrics-file", metrics) as url:
        found, accepted = talk(url)
    assert found == expected
    assert accepted > 0
    final = [line for line in map(json.loads, metrics.read_text().splitlines()) if line["event"] == "final"]
    assert any(line["kv_pages_evicted"] > 0 and line["kv_bytes_read"] > 0 for line in final)
