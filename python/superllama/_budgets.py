"""Budgets that change while a model runs: all that one call names, or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ._errors import ModelError
from ._native import ffi, last_error, lib
from ._params import ModelParams
from ._sizes import device_sizes, size_bytes


def change_budgets(model: Any, mem_budget: int | str | None, vram: int | str | Sequence[int | str] | None) -> None:
    """Set what is not None; nobody frees the native model meanwhile.

    Raises: pydantic.ValidationError for what is no size, ModelError for what cannot work; all budgets are as they were
    then.
    """
    given = {"mem_budget": mem_budget, "vram_budget": vram}
    params = ModelParams(**{name: value for name, value in given.items() if value is not None})
    mem = ffi.NULL if mem_budget is None else ffi.new("uint64_t *", size_bytes(params.mem_budget))
    devices = ffi.NULL if vram is None else ffi.new("uint64_t[]", device_sizes(params.vram_budget))
    if (mem or devices) and lib.superllama_set_budgets(model, mem, devices) < 0:
        which, _, text = last_error().partition(": ")
        named = {"mem_budget": f"mem_budget={mem_budget!r}", "vram_budget": f"vram={vram!r}"}
        raise ModelError(f"{named[which]}: {text}" if which in named else last_error())
