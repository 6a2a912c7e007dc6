"""Against unpatched llama.cpp, built from the same tree: the same tokens and the same logits, bit for bit."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from native_build import native_programs, run_native

LEAST = re.compile(r"least that works is (\d+) MiB")


def least_budget_mib(*arguments: object) -> int:
    """The smallest budget that works, found by asking: the refusal names it."""
    budget = 1
    for _ in range(4):
        command = [
            native_programs() / "probe",
            *map(str, arguments),
            "--dynamic-layers",
            "--mem-budget",
            f"{budget}MiB",
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode == 0:
            return budget
        named = LEAST.search(done.stderr)
        assert named, done.stderr
        budget = int(named[1])  # rounded up: what is named works as typed
    raise AssertionError(f"{budget} MiB was named as enough and refused again")


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize("repack", [0, 1])
def test_without_our_flags(demo_model: Path, threads: int, repack: int) -> None:
    arguments = ["-m", demo_model, "-n", 24, "-t", threads, "--repack", repack]
    ours, stock = run_native("probe", *arguments), run_native("probe-stock", *arguments)
    assert ours["tokens"] == stock["tokens"]
    assert ours["hash"] == stock["hash"]


@pytest.mark.parametrize("prefetch", [[], ["--async-prefetch"]], ids=["sync", "async"])
@pytest.mark.parametrize("policy", ["pin", "lru"])
@pytest.mark.parametrize("threads", [1, 4])
def test_with_dynamic_layers(demo_model: Path, threads: int, policy: str, prefetch: list[str]) -> None:
    arguments = ["-m", demo_model, "-n", 8, "-t", threads, "-c", 256, "-ub", 64]
    budget = least_budget_mib(*arguments) + 8
    ours = run_native(
        "probe", *arguments, "--dynamic-layers", "--layer-policy", policy, "--mem-budget", f"{budget}MiB", *prefetch
    )
    stock = run_native("probe-stock", *arguments)
    assert ours["hash"] == stock["hash"]
    assert ours["tokens"] == stock["tokens"]
    assert ours["metrics"]["layers_evicted"] > 100
    assert ours["metrics"]["weight_bytes_read"] > 5 * demo_model.stat().st_size * 0.4
    assert ours["metrics"]["weight_bytes_resident"] <= budget << 20


# ---------------------------------------------------------------- every architecture

DENSE = ["llama", "qwen2vl", "qwen3", "gemma3", "granitehybrid", "falcon-h1", "mamba2"]
MOE = [
    "llama",
    "mistral3",
    "qwen2moe",
    "qwen3moe",
    "qwen3next",
    "olmoe",
    "gpt-oss",
    "deepseek",
    "deepseek2",
    "granitemoe",
]
MOE += ["dbrx", "grok", "phimoe", "glm4moe", "ernie4_5-moe", "hunyuan-moe", "llama4"]
FAMILIES = [f"{name}-dense" for name in DENSE] + [f"{name}-moe" for name in MOE]


@pytest.mark.parametrize("repack", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, repack: int, architectures: dict[str, Path]) -> None:
    arguments = ["-m", architectures[family], "--n-prompt", 20, "-n", 5, "-c", 256, "-ub", 16, "--repack", repack]
    stock = run_native("probe-stock", *arguments)
    budget = least_budget_mib(*arguments)
    ours = run_native("probe", *arguments, "--dynamic-layers", "--async-prefetch", "--mem-budget", f"{budget}MiB")
    assert ours["hash"] == stock["hash"]
    if family.endswith("-moe"):
        assert ours["metrics"]["layers_evicted"] > 0
        assert ours["metrics"]["weight_bytes_read"] > 0
