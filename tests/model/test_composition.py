"""Dynamic layers together with what llama.cpp has: each gives what it gives without them, while blocks come and go."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dynamic import CONTEXT, budgets
from numpy.typing import NDArray

from superllama import Context, DecodeError, Model
from superllama._programs import find_program

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")

PROMPT = "The capital of France is Paris. The capital of Italy is"
BYTES_PER_CELL = 23040  # of the demo model's KV cache in f16


def both(path: Path, run: Callable[[Context], Any], **context: Any) -> tuple[Any, Any]:
    """The results of a function without and with dynamic layers, at a budget that makes them stream."""
    context = CONTEXT | context
    least, full = budgets(path, context)
    with Model(path) as model, Context(model, **context) as ctx:
        expected = run(ctx)
    with Model(path, dynamic_layers=True, async_prefetch=True, mem_budget=(3 * least + full) // 4) as model:
        with Context(model, **context) as ctx:
            result = run(ctx)
            metrics = ctx.metrics()
        assert metrics.layers_evicted > 0
        assert metrics.weight_bytes_read > full - least
    return expected, result


def text(ctx: Context, **params: Any) -> str:
    return "".join(piece.text for piece in ctx.generate(PROMPT, max_tokens=12, **params))


@pytest.mark.parametrize("flash_attn", ["on", "off"])
@pytest.mark.parametrize("type_kv", ["f16", "q8_0"])
def test_kinds_of_attention(demo_model: Path, flash_attn: str, type_kv: str) -> None:
    if type_kv != "f16" and flash_attn == "off":
        pytest.skip("llama.cpp wants flash attention for a quantized V cache")

    def run(ctx: Context) -> np.ndarray:
        ctx.decode(ctx.model.tokenize(PROMPT))
        first = ctx.logits().copy()
        ctx.decode([1])
        return np.concatenate([first, ctx.logits()])

    expected, result = both(demo_model, run, flash_attn=flash_attn, type_k=type_kv, type_v=type_kv)
    assert np.array_equal(expected, result)


def test_several_sequences(demo_model: Path) -> None:
    def run(ctx: Context) -> np.ndarray:
        rows = []
        for seq in range(3):
            ctx.decode(ctx.model.tokenize(PROMPT)[: 4 + 2 * seq], seq=seq)
        ctx.seq_copy(0, 3)
        for token in (5, 6, 7):
            for seq in range(4):
                ctx.decode([token + seq], seq=seq)
                rows.append(ctx.logits()[0].copy())
        return np.stack(rows)

    expected, result = both(demo_model, run, n_seq_max=4, n_ctx=512)
    assert np.array_equal(expected, result)


@pytest.mark.parametrize("paged", [False, True])
def test_a_kv_cache_lends_what_it_does_not_use(demo_model: Path, paged: bool) -> None:
    """Weights have the memory of KV cells until those are used, and again once they are dropped."""
    context = {"n_ctx": 2048, "n_batch": 512, "n_ubatch": 64, "n_threads": 2}
    tokens = [(7 * i) % 1000 + 10 for i in range(1536)]
    with Model(demo_model) as model, Context(model, **context) as ctx:
        ctx.decode(tokens)
        expected = ctx.logits().copy()
    least, _ = budgets(demo_model, context)
    budget = least + 8 * 2**20
    with Model(demo_model, dynamic_layers=True, async_prefetch=True, mem_budget=budget) as model:
        with Context(model, **context, flash_attn="off") as ctx:  # V is transposed then, and lends nothing
            ctx.decode([1])
            without = ctx.metrics().weight_bytes_resident
        with Context(model, **context, paged_kv=paged) as ctx:
            resident, n_used = [], 0
            for part in (tokens[:256], tokens[256:]):
                ctx.decode(part)
                n_used += len(part)
                resident.append(ctx.metrics().weight_bytes_resident)
                held = ctx.kv_pages().resident_bytes if paged else n_used * BYTES_PER_CELL
                assert resident[-1] + held < budget
            assert (ctx.metrics().kv_pages_cpu > 0) == paged
            result = ctx.logits().copy()
            evicted = ctx.metrics().layers_evicted
            ctx.clear()
            for token in (1, 2, 3):
                ctx.decode([token])
            resident.append(ctx.metrics().weight_bytes_resident)
    assert np.array_equal(expected, result)
    assert resident[0] > without + 20e6
    assert resident[1] < resident[0] - 15e6
    assert resident[2] > resident[1] + 15e6
    assert evicted > 0


def test_compute_buffers_lend_what_a_graph_does_not_use(demo_model: Path) -> None:
    """Tokens that are decoded alone leave most of the compute buffers to weights; a prompt of which all logits are
    wanted takes them back."""
    context = {"n_ctx": 1024, "n_batch": 512, "n_threads": 2}
    prompt = [(7 * i) % 1000 + 10 for i in range(400)]

    def run(ctx: Context) -> tuple[list[NDArray[np.float32]], list[tuple[int, float]]]:
        rows, memory = [], []
        for part in (prompt, [1], [2], [3], [4], [5], [6], prompt):
            ctx.decode(part, logits="all")
            rows.append(ctx.logits().copy())
            metrics = ctx.metrics()
            memory.append((metrics.weight_bytes_resident, metrics.ram_used_mb * 2**20))
        return rows, memory

    with Model(demo_model) as model, Context(model, **context) as ctx:
        expected, _ = run(ctx)
    least, _ = budgets(demo_model, context)
    logits = 400 * 49152 * 4
    with (
        Model(demo_model, dynamic_layers=True, async_prefetch=True, mem_budget=least + logits + 2 * 2**20) as model,
        Context(model, **context) as ctx,
    ):
        result, memory = run(ctx)
    assert all(np.array_equal(a, b) for a, b in zip(expected, result, strict=True))
    (first, ram_first), *_, (alone, ram_alone), (again, _) = memory
    assert alone > first + 12e6
    assert ram_alone < ram_first  # buffers gave what weights got
    assert again < alone - 12e6


def test_logits_count_towards_the_budget(demo_model: Path) -> None:
    """Where there is no memory for the logits of a whole prompt, they are refused with the numbers; nothing is lost."""
    context = {"n_ctx": 1024, "n_batch": 512, "n_threads": 2}
    prompt = [(7 * i) % 1000 + 10 for i in range(400)]
    with Model(demo_model) as model, Context(model, **context) as ctx:
        ctx.decode(prompt)
        expected = ctx.logits().copy()
    least, _ = budgets(demo_model, context)
    with (
        Model(demo_model, dynamic_layers=True, async_prefetch=True, mem_budget=least + 2 * 2**20) as model,
        Context(model, **context) as ctx,
    ):
        with pytest.raises(DecodeError, match=r"too few.*least that works is \d+ MiB.*fewer tokens want logits"):
            ctx.decode(prompt, logits="all")
        ctx.decode(prompt)
        assert np.array_equal(expected, ctx.logits())


def test_grammar_and_sampling(demo_model: Path) -> None:
    def run(ctx: Context) -> list[str]:
        city = 'root ::= " " [A-Z] [a-z]+ "."'
        return [text(ctx, grammar=city, temperature=0), text(ctx, temperature=1.2, seed=7, top_p=0.9)]

    expected, result = both(demo_model, run)
    assert expected == result
    assert re.fullmatch(r" [A-Z][a-z]+\.?", result[0])


def test_lora(tiny_model: Path, tiny_lora: Path) -> None:
    def run(ctx: Context) -> np.ndarray:
        lora = ctx.model.load_lora(tiny_lora)
        rows = []
        for adapters in ([], [(lora, 1.0)], [(lora, 0.5)], []):
            ctx.set_lora(adapters)
            ctx.clear()
            ctx.decode(ctx.model.tokenize("the one of and"))
            rows.append(ctx.logits().copy())
        return np.stack(rows)

    expected, result = both(tiny_model, run)
    assert np.array_equal(expected, result)
    assert not np.array_equal(result[0], result[1])


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
def test_embeddings(tiny_bert: Path, demo_model: Path, kind: str) -> None:
    def run(ctx: Context) -> np.ndarray:
        return np.stack([ctx.embed(t) for t in ("the one", "of and", "is it")])

    path, pooling = (tiny_bert, "model") if kind == "encoder" else (demo_model, "mean")
    expected, result = both(path, run, embeddings=True, pooling=pooling)
    assert np.array_equal(expected, result)


# ---------------------------------------------------------------- programs


def streaming(metrics: Path, budget_mib: int) -> list[str]:
    return ["--dynamic-layers", "--async-prefetch", "--mem-budget", f"{budget_mib}MiB", "--metrics-file", str(metrics)]


def named_least(log: str) -> int:
    """The budget that a program which found its own too small asks for, MiB."""
    found = re.search(r"least that works is (\d+) MiB", log)
    assert found, log[-500:]
    return int(found[1])


def evictions(metrics: Path) -> int:
    return max(json.loads(line)["layers_evicted"] for line in metrics.read_text().splitlines())


def test_perplexity(demo_model: Path, tmp_path: Path) -> None:
    corpus, metrics = tmp_path / "corpus.txt", tmp_path / "metrics.jsonl"
    corpus.write_text("The river ran past the old mill, and the miller counted his sacks. " * 40)
    command = [find_program("llama-perplexity"), "-m", demo_model, "-f", corpus, "-c", "128", "-b", "128", "-t", "2"]

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*map(str, command), *more], capture_output=True, text=True, timeout=300)

    estimate = re.compile(r"Final estimate: PPL = \S+ \+/- \S+")
    budget = 32
    # too little for the context, then for the logits of all tokens, of which llama-perplexity makes no error of its own
    while not estimate.findall((done := run(*streaming(metrics, budget))).stdout + done.stderr):
        assert named_least(done.stderr) >= budget
        budget = named_least(done.stderr) + 8
    stock = run()
    assert estimate.findall(done.stdout + done.stderr) == estimate.findall(stock.stdout + stock.stderr) != []
    assert evictions(metrics) > 0


class Server:
    """A server with two slots, asked one prompt after the other."""

    def __init__(self, path: Path, log: Path, *more: str) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{s.getsockname()[1]}"
        command = [find_program("llama-server"), "-m", path, "--port", self.url.rpartition(":")[2]]
        command += ["-c", "1024", "-ub", "64", "-np", "2", "-t", "2"]
        with log.open("w") as out:
            self.child = subprocess.Popen([*map(str, command), *more], stdout=out, stderr=out)

    def ready(self) -> bool:
        """False if it ended."""
        while self.child.poll() is None:
            try:
                urllib.request.urlopen(f"{self.url}/health", timeout=5).read()
                return True
            except OSError:
                time.sleep(0.1)
        return False

    def answers(self) -> list[str]:
        found = []
        for i, prompt in enumerate(JOBS):
            ask = {"prompt": prompt, "n_predict": 24, "temperature": 0, "id_slot": i % 2}
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(f"{self.url}/completion", json.dumps(ask).encode(), headers)
            found.append(json.load(urllib.request.urlopen(request, timeout=120))["content"])
        return found

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.child.terminate()
        self.child.wait(timeout=60)


JOBS = [
    PROMPT,
    "def add(a, b):\n    return a + b\n\ndef add(a, b):\n    return",
    PROMPT + " Rome.",
    "1 2 3 4 1 2 3 4 1",
]


@pytest.mark.parametrize("kind", ["slots", "n-gram", "draft"])
def test_server(demo_model: Path, tmp_path: Path, kind: str) -> None:
    more = {
        "slots": [],
        "n-gram": ["--spec-type", "ngram-simple", "--spec-ngram-simple-size-n", "3"],
        "draft": ["-md", str(demo_model), "--spec-type", "draft-simple"],
    }[kind]
    log, metrics = tmp_path / "log", tmp_path / "metrics.jsonl"
    with Server(demo_model, log, *more) as server:
        assert server.ready()
        expected = server.answers()
    budget = 32
    while True:
        with Server(demo_model, log, *more, *streaming(metrics, budget)) as server:
            if server.ready():
                assert server.answers() == expected
                break
        assert named_least(log.read_text()) >= budget
        budget = named_least(log.read_text()) + 8
    assert evictions(metrics) > 0
