"""The plan before a load: its arithmetic, with given speeds of disk and CPU, and the command over it."""

from __future__ import annotations

import json
import mmap
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from tiny_model import write_zeros

import superllama
from superllama import _plan, _read_speed, cli

GB = 10**9
MACHINE = _plan.Machine(2e9, "O_DIRECT", 20e9, "q4_0", 2)


def c_plan(**kwargs: Any) -> SimpleNamespace:
    """A dense model of 4 GB, half of it streamed."""
    values = {
        "mem_budget_bytes": 3 * GB,
        "works": True,
        "fixed_bytes": GB // 2,
        "dense_bytes": 4 * GB,
        "pinned_bytes": 2 * GB,
        "ring_bytes": GB // 10,
        "streamed_bytes": 2 * GB,
        "expert_bytes": 0,
        "expert_pool_bytes": 0,
        "expert_used_bytes": 0,
        "kv_bytes": GB // 5,
        "projector_bytes": 0,
        "compute_bytes": GB // 10,
        "repacked_bytes": 4 * GB,
        "n_ubatch": 256,
    }
    return SimpleNamespace(**values | kwargs)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> _plan.Machine:
    monkeypatch.setattr(_plan, "measure", lambda path, repack, n_threads: (MACHINE, 10e9))
    return MACHINE


# ---------------------------------------------------------------- arithmetic


def test_the_slower_of_disk_and_cpu_is_the_limit() -> None:
    row = _plan.row("asked", c_plan(), 2e9, 20e9)
    assert (row.seconds_disk, row.seconds_cpu) == (1.0, 0.225)
    assert (row.tokens_per_s, row.limit) == (1.0, "disk")
    assert row.read_bytes_per_token == 2 * GB
    row = _plan.row("asked", c_plan(), 2e9, 1.5e9)
    assert (row.tokens_per_s, row.limit) == (pytest.approx(1 / 3), "CPU")
    assert _plan.row("100 %", c_plan(streamed_bytes=0), 2e9, 20e9).limit == "CPU"


def test_a_budget_that_does_not_work_promises_nothing() -> None:
    row = _plan.row("asked", c_plan(works=False), 2e9, 20e9)
    assert (row.tokens_per_s, row.limit, row.read_bytes_per_token) == (None, None, 0)


def test_experts_that_are_not_in_the_pool_are_read() -> None:
    moe = c_plan(streamed_bytes=0, expert_bytes=8 * GB, expert_pool_bytes=6 * GB, expert_used_bytes=GB)
    row = _plan.row("asked", moe, 2e9, 20e9)
    assert row.expert_read_bytes == GB // 4
    assert row.seconds_disk == 0.125
    # a pass of many tokens reads no more than what is missing
    prompt = _plan.prompt_of(moe, row, 4096, 2e9)
    assert prompt.seconds_least == 2 * (2 * GB) / 2e9


def test_a_prompt_streams_the_layers_once_per_ubatch() -> None:
    p = c_plan()
    prompt = _plan.prompt_of(p, _plan.row("asked", p, 2e9, 20e9), 4096, 2e9)
    assert (prompt.n_tokens, prompt.n_passes, prompt.seconds_least) == (512, 2, 2.0)
    assert prompt.seconds_most == 512 * 0.225
    assert prompt.advice is not None
    assert "ubatch of 512" in prompt.advice
    p = c_plan(n_ubatch=4096)
    assert _plan.prompt_of(p, _plan.row("asked", p, 2e9, 20e9), 4096, 2e9).advice is None
    p = c_plan(streamed_bytes=0)
    assert _plan.prompt_of(p, _plan.row("asked", p, 2e9, 20e9), 4096, 2e9).advice is None


@pytest.mark.parametrize(
    ("packed", "rate_packed", "rate_plain", "faster", "why"),
    [
        ({}, 20e9, 10e9, "repack", "waits for the disk.*2.00x"),
        ({}, 2e9, 1e9, "repack", "CPU is the limit.*2.00x"),
        ({}, 1e9, 2e9, "no-repack", "plain kernels are 2.00x"),
        ({}, 20e9, 20e9, "no-repack", "no file"),
        ({"streamed_bytes": 0}, 20e9, 20e9, "same", "equally fast"),
        ({"repacked_bytes": 0}, 20e9, 10e9, "same", "no layout of its own"),
        ({"works": False}, 20e9, 10e9, "same", "too small"),
    ],
)
@pytest.mark.parametrize("asked", [True, False])
def test_whether_repacking_is_worth_it(
    packed: dict[str, Any],
    rate_packed: float,
    rate_plain: float,
    faster: str,
    why: str,
    asked: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_plan, "room_for", lambda n_bytes: None)
    plans = c_plan(**packed), c_plan(**packed | {"repacked_bytes": 0})
    rows = _plan.row("", plans[0], 2e9, rate_packed), _plan.row("", plans[1], 2e9, rate_plain)
    order = (plans[0], rows[0], plans[1], rows[1]) if asked else (plans[1], rows[1], plans[0], rows[0])
    found = _plan.repack_of(asked, *order)
    assert found.faster == faster
    assert re.search(why, found.why)
    if faster == "repack":
        assert found.file_bytes == (4 * GB if asked else 0)


def test_a_full_disk_speaks_against_repacking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_plan, "room_for", lambda n_bytes: GB)
    packed, plain = c_plan(), c_plan(repacked_bytes=0)
    rows = _plan.row("", packed, 2e9, 20e9), _plan.row("", plain, 2e9, 10e9)
    found = _plan.repack_of(True, packed, rows[0], plain, rows[1])
    assert found.faster == "no-repack"
    assert "room for 1.0 GB" in found.why


def test_the_room_for_repacked_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SUPERLLAMA_CACHE", str(tmp_path / "not" / "there"))
    assert _plan.room_for(1) is None
    assert (_plan.room_for(2**60) or 0) > 0


# ---------------------------------------------------------------- of a file


def test_a_plan_of_a_model(tiny_model: Path, machine: _plan.Machine) -> None:
    plan = superllama.plan(tiny_model, mem_budget="1GiB", n_ctx=256)
    assert (plan.n_layers, plan.n_experts, plan.n_ctx) == (4, 0, 256)
    assert plan.model_bytes == tiny_model.stat().st_size
    assert plan.asked.mem_budget_bytes == 1 << 30
    assert plan.asked.works
    assert plan.asked.read_bytes_per_token == 0
    assert {row.label for row in plan.table} == {"least", "25 %", "50 %", "75 %", "90 %", "100 %"}
    budgets = [row.mem_budget_bytes for row in plan.table]
    assert budgets == sorted(budgets)
    for row in plan.table:
        assert row.works == (row.mem_budget_bytes >= plan.mem_least_bytes)
    full = plan.table[-1]
    assert full.read_bytes_per_token == 0
    # the numbers are those of the structs that are gone by now
    assert plan.mem_full_bytes == full.mem_budget_bytes < 1 << 30


def test_a_budget_too_small_is_a_plan_too(tiny_model: Path, machine: _plan.Machine) -> None:
    plan = superllama.plan(tiny_model, mem_budget=4096)
    assert not plan.asked.works
    assert plan.asked.tokens_per_s is None
    assert plan.mem_least_bytes > 4096


def test_a_larger_context_needs_more(tiny_model: Path, machine: _plan.Machine) -> None:
    small, large = (superllama.plan(tiny_model, n_ctx=n_ctx) for n_ctx in (256, 512))
    assert large.asked.kv_bytes == 2 * small.asked.kv_bytes


def test_page_tables_lie_in_the_budget(tmp_path: Path, machine: _plan.Machine) -> None:
    model = write_zeros(tmp_path / "large.gguf", 4096, 40, 16384)
    assert model.stat().st_size > 40 * GB
    plan = superllama.plan(model, mem_budget=30 * GB, n_ctx=256, repack=False)
    for row in (plan.asked, *plan.table):
        used = row.fixed_bytes + row.kv_bytes + row.compute_bytes + row.pinned_bytes + row.ring_bytes
        tables = row.mem_budget_bytes // mmap.PAGESIZE * 8  # 8 bytes for each page
        past_free = max(0, tables - (24 << 20))  # the process has room for this much besides
        if row.streamed_bytes > 0:
            assert used == row.mem_budget_bytes - past_free
        else:
            assert used <= row.mem_budget_bytes - past_free < used + (1 << 20)


@pytest.mark.parametrize("kwargs", [{"mem_budget": "8 parsecs"}, {"n_ubatch": 0}, {"n_threads": -1}])
def test_wrong_values_name_the_field(tiny_model: Path, kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(kwargs))):
        superllama.plan(tiny_model, **kwargs)


def test_no_model(tmp_path: Path) -> None:
    with pytest.raises(superllama.ModelError, match="does not exist"):
        superllama.plan(tmp_path / "none.gguf")


def test_a_real_measurement(tiny_model: Path) -> None:
    machine, other = _plan.measure(tiny_model, True, 1)
    assert machine.read_bytes_per_s > 0
    assert machine.cpu_bytes_per_s > 0
    assert other > 0
    assert machine.cpu_type == "f32"


# ---------------------------------------------------------------- the reader


def test_the_reader_reads_to_the_end_or_the_limit(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(9_000_001))
    assert _read_speed.measure_read(file, max_bytes=1 << 30, max_seconds=60).bytes == 9_000_001
    assert _read_speed.measure_read(file, max_bytes=4 << 20, max_seconds=60).bytes == 4 << 20
    assert _read_speed.measure_read(file, max_bytes=1 << 30, max_seconds=0).bytes == 0
    with pytest.raises(OSError, match="none"):
        _read_speed.measure_read(tmp_path / "none", max_bytes=1, max_seconds=1)


def test_without_o_direct(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.O_DIRECT", raising=False)
    file = tmp_path / "data"
    file.write_bytes(bytes(5_000_000))
    speed = _read_speed.measure_read(file, max_bytes=1 << 30, max_seconds=60)
    assert speed.bytes == 5_000_000
    assert speed.how.startswith("buffered")


# ---------------------------------------------------------------- the command


def test_the_command(tiny_model: Path, machine: _plan.Machine, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(tiny_model), "--mem-budget", "1GiB", "-c", "256", "-ub", "64", "-t", "1"]
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"]["n_ubatch"] == 64
    assert found["asked"]["read_bytes_per_token"] == 0
    assert len(found["table"]) == 6
    assert cli.main([*arguments, "--no-repack"]) == 0
    out = capsys.readouterr().out
    for word in ("tiny.gguf", "2.00 GB/s", "100 %", "F fixed", "repacking"):
        assert word in out


def test_the_command_says_what_would_work(
    tiny_model: Path, machine: _plan.Machine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", str(tiny_model), "--mem-budget", "1MiB"]) == 0
    assert "the least that works is" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [["--mem-budget", "lots"], ["-ub", "0"], ["-t", "0"], ["-c", "-1"]])
def test_wrong_flags_are_one_line(tiny_model: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", str(tiny_model), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"superllama plan: {arguments[0]} {arguments[1]}: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("form", [["-m", "{}"], ["-m{}"], ["--model", "{}"], ["--model={}"], ["{}"]])
def test_every_form_of_the_option_names_a_model(
    tmp_path: Path, form: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", *(part.format(tmp_path / "no.gguf") for part in form)]) == 1
    assert "no.gguf does not exist" in capsys.readouterr().err
    assert cli.main(["plan", "a.gguf", "-m", "b.gguf"]) == 2


def test_a_link_has_the_bytes_of_its_model(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "link.gguf").symlink_to(tiny_model)
    assert superllama.plan(tmp_path / "link.gguf", n_ctx=64).model_bytes == tiny_model.stat().st_size
