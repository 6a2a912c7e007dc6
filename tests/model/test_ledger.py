"""The ledger: every byte of host memory that a dynamic model and its contexts take is in it, by what it is for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import tiny_model as tiny
from bench import make_model
from dynamic import MIB
from running import Runner

import superllama

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")

TOLERANCE = 8 * MIB  # the heap of the interpreter and the allocator, what graphs are described by

# In an interpreter of its own: the anonymous memory that a scenario takes, beside what the model says it is for. The
# scenario runs once before, in the same way and without a budget, so that heap and libraries are there.
SCRIPT = """
import ctypes, json, sys
import numpy as np
import superllama

path, scenario, lora, state = sys.argv[1:5]
TEXT = list(range(100, 500))

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10

def run(model):
    options = dict(n_ctx=512, n_ubatch=256, n_batch=512, n_threads=2)
    if scenario == "no_flash_attention":
        options |= dict(flash_attn="off")
    if scenario == "paged_kv":
        options |= dict(paged_kv=True, kv_budget="32MiB", flash_attn="on")
    if scenario == "long_prompt":
        options |= dict(n_ctx=2048, n_ubatch=512)
    tokens = [t % model.n_vocab for t in TEXT] * (4 if scenario == "long_prompt" else 1)
    contexts = [superllama.Context(model, **options) for _ in range(2 if scenario == "two_contexts" else 1)]
    for ctx in contexts:
        if scenario == "lora":
            ctx.set_lora([(model.load_lora(lora), 1.0)])
        for i in range(0, len(tokens), 512):
            ctx.decode(tokens[i : i + 512])
        for _ in range(4):
            ctx.decode([int(np.argmax(ctx.logits()[-1]))])
        if scenario == "state_file":
            ctx.state_save_file(state)
            ctx.clear()
            ctx.state_load_file(state)
            ctx.decode([5])
    return contexts

def trim():
    ctypes.CDLL(None).malloc_trim(0)

def measure(**kwargs):
    with superllama.Model(path, use_extra_bufts=False, **kwargs) as model:
        contexts = run(model)
        trim()
        memory, used = model.memory(), anonymous()
        metrics = contexts[0].metrics()
        for ctx in contexts:
            ctx.close()
    return memory, used, metrics

measure() # heap
trim()
base = anonymous()
memory, used, metrics = measure(dynamic_layers=True, async_prefetch=True, mem_budget=int(sys.argv[5]))
print(json.dumps(dict(memory=memory, used=used - base, budget=metrics.mem_budget_bytes,
                      by_tag=metrics.memory_by_tag, read=metrics.weight_bytes_read)))
"""

SCENARIOS = ["plain", "no_flash_attention", "paged_kv", "long_prompt", "two_contexts", "lora", "state_file"]


@pytest.fixture(scope="module")
def moe(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    spec = make_model.Spec(kind="moe", n_layer=8, n_embd=1024, n_expert=16, n_expert_used=4, n_ff=512)
    make_model.make_model(path, demo_model, spec)
    return path


def check(run_python: Runner, path: Path, scenario: str, budget: int, lora: Path, state: Path) -> None:
    done = run_python(SCRIPT, path, scenario, lora, state, budget)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    total = sum(found["memory"].values())
    assert total <= found["budget"], found
    assert abs(found["used"] - total) <= TOLERANCE, found
    assert set(found["by_tag"]) == set(found["memory"])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_ledger_is_the_memory_of_a_dense_model(
    run_python: Runner, demo_model: Path, scenario: str, tmp_path: Path, tiny_lora: Path
) -> None:
    if scenario == "lora":
        model = tiny.write_llama(tmp_path / "tiny.gguf")
        lora = tiny.write_lora(tmp_path / "lora.gguf", rank=tiny.N_EMBD)
        check(run_python, model, scenario, 96 * MIB, lora, tmp_path / "state")
    else:
        check(run_python, demo_model, scenario, 230 * MIB, tiny_lora, tmp_path / "state")


@pytest.mark.parametrize("scenario", ["plain", "two_contexts"])
def test_the_ledger_is_the_memory_of_experts(
    run_python: Runner, moe: Path, scenario: str, tmp_path: Path, tiny_lora: Path
) -> None:
    check(run_python, moe, scenario, (170 if scenario == "plain" else 220) * MIB, tiny_lora, tmp_path / "state")


def test_a_model_without_a_budget_has_no_ledger(model: superllama.Model, ctx: superllama.Context) -> None:
    assert set(model.memory().values()) == {0}
    assert set(ctx.metrics().memory_by_tag.values()) == {0}


def test_what_goes_is_given_back(demo_model: Path) -> None:
    with superllama.Model(demo_model, dynamic_layers=True, use_extra_bufts=False) as model:
        before = model.memory()
        with superllama.Context(model, n_ctx=512) as ctx:
            ctx.decode([1, 2, 3])
            during = model.memory()
            assert during["kv"] > 0
            assert during["compute"] > 0
            assert during["outputs"] > 0
            assert during["cpu_work"] > 0
        after = model.memory()
    for tag in ("kv", "compute", "outputs", "cpu_work"):
        assert before[tag] == after[tag] == 0, (before, after)
