"""One rule for budgets: what is given switches on what enforces it, nothing is ignored, and all change or none."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import superllama
from superllama import ContextParams, ModelParams
from superllama._native import ffi, lib
from superllama._params import merged

MODEL_BUDGETS: list[dict[str, Any]] = [
    {"mem_budget": "1GiB"},
    {"mem_budget": 10**9},
    {"mem_budget": "50%"},
    {"vram_budget": 0},
    {"vram_budget": ["auto", "1GiB"]},
    {"async_prefetch": True},
]
CONTEXT_BUDGETS: list[dict[str, Any]] = [{"kv_budget": "1GiB"}, {"spill_dir": "/tmp"}, {"async_prefetch": True}]


@pytest.mark.parametrize("given", MODEL_BUDGETS)
def test_a_budget_of_a_model_switches_dynamic_layers_on(given: dict[str, Any]) -> None:
    params = ModelParams(**given)
    assert params.dynamic_layers
    assert params.to_c([]).superllama.dynamic_layers
    with pytest.raises(ValidationError, match="dynamic_layers=False"):
        ModelParams(**given, dynamic_layers=False)


@pytest.mark.parametrize("given", CONTEXT_BUDGETS)
def test_a_budget_of_a_context_switches_paged_kv_on(given: dict[str, Any]) -> None:
    assert ContextParams(**given).paged_kv
    with pytest.raises(ValidationError, match="paged_kv=False"):
        ContextParams(**given, paged_kv=False)


def test_auto_switches_nothing_on() -> None:
    assert not ModelParams(mem_budget="auto", vram_budget="auto", async_prefetch=False).dynamic_layers
    assert not ModelParams(vram_budget=["auto", "auto"]).dynamic_layers
    assert not ContextParams(kv_budget="auto", spill_dir=None).paged_kv


def test_what_was_switched_on_goes_with_the_budget() -> None:
    params = ModelParams(mem_budget="1GiB")
    assert not merged(ModelParams, params, {"mem_budget": "auto"}).dynamic_layers
    assert merged(ModelParams, params, {"mem_budget": "2GiB"}).dynamic_layers


@pytest.mark.parametrize("nothing", [0, "0", "", " ", "0MiB", "0%"])
def test_nothing_is_no_budget(nothing: object) -> None:
    for kind, name in ((ModelParams, "mem_budget"), (ContextParams, "kv_budget")):
        with pytest.raises(ValidationError, match=name):
            kind(**{name: nothing})
    if nothing not in (0, "0", "0MiB"):  # 0 on a device means no layers
        with pytest.raises(ValidationError):
            ModelParams(vram_budget=nothing)
    with pytest.raises(ValidationError):
        ModelParams(vram_budget=[])


def test_one_line_of_log_says_what_was_switched_on(tiny_model: Path, caplog: pytest.LogCaptureFixture) -> None:
    def lines(name: str) -> list[str]:
        return [m for m in caplog.messages if f"{name} is on" in m]

    with caplog.at_level(logging.INFO, logger="superllama"):
        with superllama.Model(tiny_model, mem_budget="1GiB", async_prefetch=True, devices=[]) as model:
            assert lines("dynamic_layers") == ["dynamic_layers is on, for mem_budget and async_prefetch"]
            superllama.Context(model, kv_budget="64MiB").close()
            assert len(lines("paged_kv")) == 1
        caplog.clear()
        superllama.Model(tiny_model, dynamic_layers=True, mem_budget="1GiB", devices=[]).close()
        assert lines("dynamic_layers") == []


@pytest.fixture
def dynamic(tiny_model: Path) -> Any:
    with superllama.Model(tiny_model, mem_budget="1GiB", devices=[]) as model:  # other tests leave servers
        yield model


def in_force(model: superllama.Model) -> tuple[int, int]:
    """The budgets of the host and of the first device, as the library has them."""
    mem, vram = ffi.new("uint64_t *"), ffi.new("uint64_t[]", 16)
    with model._use() as c:
        assert lib.superllama_budgets(c, mem, vram) == 0
    return mem[0], vram[0]


@pytest.mark.parametrize("nothing", [0, "0", "", "0MiB"])
def test_set_budget_takes_no_nothing(dynamic: superllama.Model, nothing: Any) -> None:
    with pytest.raises(ValidationError, match="mem_budget"):
        dynamic.set_budget(nothing)
    assert in_force(dynamic) == (1 << 30, 0)


def test_a_budget_is_set_without_naming_the_switch(dynamic: superllama.Model) -> None:
    dynamic.set_budget("2GiB")
    assert in_force(dynamic) == (2 << 30, 0)
    dynamic.set_budget()  # nothing named, nothing changed
    assert in_force(dynamic) == (2 << 30, 0)
    with pytest.raises(superllama.ModelError, match=r"mem_budget='1KiB': .*least that works"):
        dynamic.set_budget("1KiB")
    assert in_force(dynamic) == (2 << 30, 0)


def test_without_a_device_nothing_of_the_call_happens(dynamic: superllama.Model) -> None:
    with pytest.raises(superllama.ModelError, match="vram='1GiB': there is no device"):
        dynamic.set_budget("2GiB", vram="1GiB")
    assert in_force(dynamic) == (1 << 30, 0)


def test_a_model_without_budgets_says_so(tiny_model: Path) -> None:
    with superllama.Model(tiny_model) as model:
        model.set_budget()
        with pytest.raises(superllama.ModelError, match="without dynamic layers"):
            model.set_budget("1GiB")
