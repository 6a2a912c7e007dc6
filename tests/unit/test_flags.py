"""Flags that only something else enforces switch that on, and say so; what means nothing is refused with a hint."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from superllama._programs import find_program


def complete(model: Path, *flags: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [find_program("llama-completion"), "-m", model, "-p", "the", "-n", 2, "-no-cnv", "-c", 256, *flags]
    return subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        errors="replace",  # a random model writes any bytes
        stdin=subprocess.DEVNULL,
        env=os.environ | environment,
        timeout=120,
    )


LAYERS, PAGES = "switches on --dynamic-layers", "switches on --paged-kv"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--mem-budget", "1GiB"], [LAYERS]),
        (["--vram-budget", "1GiB"], [LAYERS]),
        (["--vram-budget", "0"], [LAYERS]),
        (["--async-prefetch"], [LAYERS]),
        (["--kv-budget", "64MiB"], [PAGES]),
        (["--kv-budget", "64MiB", "--async-prefetch"], [PAGES]),
        (["--mem-budget", "1GiB", "--kv-budget", "64MiB"], [LAYERS, PAGES]),
        (["--mem-budget", "auto", "--vram-budget", "auto", "--kv-budget", "auto"], []),
        (["--mem-budget", "1GiB", "--dynamic-layers"], []),
        (["--dynamic-layers", "--mem-budget", "1GiB"], []),
        (["--paged-kv", "--async-prefetch", "--kv-budget", "64MiB"], []),
        (["--async-prefetch", "--paged-kv"], []),
    ],
    ids=lambda value: " ".join(value),
)
def test_what_enforces_a_flag_is_switched_on(
    tiny_model: Path, tmp_path: Path, flags: list[str], said: list[str]
) -> None:
    metrics = tmp_path / "m.jsonl"
    done = complete(tiny_model, *flags, "--metrics-file", metrics)
    assert done.returncode == 0, done.stderr[-2000:]
    for text in (LAYERS, PAGES):
        assert done.stderr.count(text) == (1 if text in said else 0), done.stderr
    last = json.loads(metrics.read_text().splitlines()[-1])
    dynamic = LAYERS in said or "--dynamic-layers" in flags
    assert (last["mem_budget_bytes"] > 0) == dynamic
    paged = PAGES in said or "--paged-kv" in flags
    assert (last["kv_pages_cpu"] > 0) >= paged


@pytest.mark.parametrize("flag", ["--mem-budget", "--kv-budget"])
@pytest.mark.parametrize("value", ["0", "", "0GiB", "-1GiB", "nan", "1,5GiB", "0x10", "inf"])
def test_budgets_that_hold_nothing(tiny_model: Path, flag: str, value: str) -> None:
    done = complete(tiny_model, flag, value)
    assert done.returncode == 1
    assert flag in done.stderr
    assert "auto" in done.stderr


@pytest.mark.parametrize("value", ["", "1GiB,", "nan", "50%"])
def test_budgets_of_devices(tiny_model: Path, value: str) -> None:
    done = complete(tiny_model, "--vram-budget", value)
    assert done.returncode == 1
    assert "--vram-budget" in done.stderr


@pytest.mark.parametrize(("flag", "value"), [("--mem-pressure", "0,9"), ("--mem-pressure", ""), ("--spill-dir", "")])
def test_other_values(tiny_model: Path, flag: str, value: str) -> None:
    done = complete(tiny_model, "--dynamic-layers", flag, value)
    assert done.returncode == 1
    assert flag in done.stderr


def test_environment(tiny_model: Path) -> None:
    done = complete(tiny_model, LLAMA_ARG_MEM_BUDGET="1GiB")
    assert done.returncode == 0, done.stderr[-2000:]
    assert LAYERS in done.stderr
    assert complete(tiny_model, LLAMA_ARG_MEM_BUDGET="0").returncode != 0
    done = complete(tiny_model, "--mem-budget", "auto", LLAMA_ARG_MEM_BUDGET="1GiB")  # the flag is the one that counts
    assert done.returncode == 0, done.stderr[-2000:]
    assert LAYERS not in done.stderr


def test_bench_has_the_same_flags(tiny_model: Path) -> None:
    bench = [find_program("llama-bench"), "-m", str(tiny_model), "-p", "8", "-n", "2", "-r", "1"]
    done = subprocess.run([*bench, "--mem-budget", "1GiB"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for flags in (["--mem-budget", "0"], ["--kv-page-size", "64x"], ["--kv-budget", ""]):
        done = subprocess.run([*bench, *flags], capture_output=True, text=True, timeout=120)
        assert done.returncode == 1
        assert flags[0] in done.stderr


def test_processes_share_a_metrics_file(tiny_model: Path, tmp_path: Path) -> None:
    """As the children of a router do: no line is cut, and none is lost."""
    metrics = tmp_path / "m.jsonl"
    metrics.write_text('{"line": "of somebody else"}\n')
    command = [find_program("llama-completion"), "-m", tiny_model, "-p", "the", "-n", 60, "-no-cnv", "-c", 256]
    command += ["--ignore-eos", "--metrics-file", metrics, "--metrics-interval", 0, "-t", 1]
    children = [
        subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(3)
    ]
    assert [child.wait(300) for child in children] == [0, 0, 0]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert lines[0] == {"line": "of somebody else"}
    assert sum(line["event"] == "final" for line in lines[1:]) == 3
    assert len(lines) > 3 * 60


def test_a_reader_that_stopped(tiny_model: Path) -> None:
    """Nobody reads the program's stderr, which is where its metrics go."""
    command = [find_program("llama-completion"), "-m", tiny_model, "-p", "the", "-n", 200, "-no-cnv", "-c", 512]
    command += ["--ignore-eos", "--metrics", "--metrics-interval", 0, "-t", 1, "-lv", 0]
    child = subprocess.Popen(
        list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert child.wait(300) == 0
    assert child.stderr is not None
    text = child.stderr.read()
    child.stderr.close()
    assert b"[METRICS] " in text
    assert all(
        line.startswith(b"[METRICS] {") == line.endswith(b"}") for line in text.splitlines() if b"METRICS" in line
    )


def test_a_fifo_with_a_reader(tiny_model: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = subprocess.Popen(["cat", fifo], stdout=subprocess.PIPE)
    done = complete(tiny_model, "--metrics-file", fifo)
    assert done.returncode == 0, done.stderr
    text, _ = reader.communicate(timeout=120)
    assert [json.loads(line) for line in text.splitlines()][-1]["event"] == "final"
