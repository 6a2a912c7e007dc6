"""Runs the C++ tests: plain, under AddressSanitizer and UndefinedBehaviorSanitizer, and under ThreadSanitizer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from bench import make_model
from native_build import native_programs

UNITS = ["size", "telemetry", "readers", "ledger", "metrics", "experts", "ring", "conversion", "kv-spill", "kv-pages"]
UNITS += ["engine", "string-pattern", "batch", "turns", "placement", "expert-banks", "host-experts", "locked-staging"]
UNITS += ["sent-ahead", "device-wait"]
if sys.platform == "linux":
    UNITS += ["files", "rpc-secret", "pool"]


@pytest.mark.parametrize("variant", ["", "-asan", "-tsan"])
@pytest.mark.parametrize("unit", UNITS)
def test_unit(unit: str, variant: str, tmp_path: Path) -> None:
    program = native_programs() / f"test-{unit}{variant}"
    done = subprocess.run([program, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("ok")


def stress_layers(
    model: Path,
    steps: int,
    seed: int,
    *,
    repack: bool = False,
    sync: bool = False,
    shim: Path | None = None,
    **faults: str,
) -> dict[str, int]:
    """The program compares every step with stock and fails unless blocks were evicted and read again. With `shim` reads
    fail too, as its variables `faults` say."""
    arguments = [str(a) for a in (model, steps, seed, int(repack), int(sync))]
    environment = os.environ | faults
    if shim:
        environment |= {"LD_PRELOAD": str(shim), "FAULT_PATH": str(model.resolve())}
    done = subprocess.run(
        [native_programs() / "stress-layers", *arguments], capture_output=True, text=True, timeout=900, env=environment
    )
    assert done.returncode == 0, done.stderr
    report: dict[str, int] = json.loads(done.stdout)
    assert report["steps"] == steps
    assert report["cancelled"] > 0
    return report


@pytest.mark.parametrize(("seed", "repack", "sync"), [(1, 1, 0), (2, 0, 0), (3, 0, 1)])
def test_random_budgets_and_cancellations_change_no_logit(seed: int, repack: int, sync: int, demo_model: Path) -> None:
    stress_layers(demo_model, 120, seed, repack=bool(repack), sync=bool(sync))


# dense, experts, a sliding window of each, recurrent states beside attention
FAULTY = ["llama-dense", "llama-moe", "gemma3-dense", "gpt-oss-moe", "falcon-h1-dense", "lfm2-dense", "qwen3next-moe"]


@pytest.mark.skipif(sys.platform != "linux", reason="the library that injects faults is for Linux")
@pytest.mark.parametrize("name", FAULTY)
def test_failing_reads_and_loaded_states_change_no_logit(
    name: str, architectures: dict[str, Path], fault_shim: Path
) -> None:
    report = stress_layers(architectures[name], 800, 5, shim=fault_shim)
    assert report["failed"] > 0
    assert report["states"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="the library that injects faults is for Linux")
@pytest.mark.parametrize("name", ["llama-dense", "llama-moe", "gpt-oss-moe"])
def test_a_read_that_fails_late_is_no_error_of_the_next_graph(
    name: str, architectures: dict[str, Path], fault_shim: Path
) -> None:
    report = stress_layers(architectures[name], 100, 6, shim=fault_shim, FAULT_LATE_MS="10")
    assert report["failed"] > 0


@pytest.mark.parametrize("repack", ["1", "0"])
def test_more_memory_counts_in_the_graph_that_runs(repack: str, demo_model: Path) -> None:
    program = native_programs() / "grow-in-graph"
    done = subprocess.run([program, demo_model, repack, "200"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    # the pass itself, and the next one: what the first one read after the change is there
    assert report["read_with_more"] < 1.4 * report["read_of_a_pass"]


@pytest.mark.parametrize("repack", [1, 0])
def test_two_thousand_steps_of_experts_that_share_pages(repack: int, demo_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "moe.gguf"
    spec = make_model.Spec(kind="moe", n_layer=4, n_embd=512, n_expert=16, n_expert_used=4, n_ff=224)
    make_model.make_model(path, demo_model, spec)
    stress_layers(path, 2000, 4, repack=bool(repack))


def test_an_engine_that_many_ask(tiny_model: Path) -> None:
    """Each gets its own answer, or none where it was cancelled, while budgets change; and the engine stops."""
    program = native_programs() / "stress-engine"
    done = subprocess.run([program, tiny_model, "400"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    kinds = ("whole", "streams", "cancelled", "left")
    assert report["wrong"] == 0 and sum(report[kind] for kind in (*kinds, "refused")) == 400
    assert min(report[kind] for kind in kinds) > 10  # how many are refused depends on how long the others take
