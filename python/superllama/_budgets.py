"""Budgets that change while a model runs: all that one call names, or none."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

from ._errors import ModelError
from ._native import last_error, lib
from ._params import ModelParams
from ._sizes import device_sizes, size_bytes


class Budgets:
    """The budgets of one native model, as they were set last."""

    def __init__(self, params: ModelParams) -> None:
        self.mem = size_bytes(params.mem_budget)
        self.vram = device_sizes(params.vram_budget)

    def change(self, model: Any, mem_budget: int | str | None, vram: int | str | Sequence[int | str] | None) -> None:
        """Set what is not None; the model's lock is held.

        Raises: pydantic.ValidationError for what is no size, ModelError for what cannot work; all budgets are as they
        were then.
        """
        given = {"mem_budget": mem_budget, "vram_budget": vram}
        named = {name: value for name, value in given.items() if value is not None}
        params = ModelParams(**named)
        steps: list[tuple[str, Any]] = []
        if mem_budget is not None:
            steps.append(("mem", size_bytes(params.mem_budget)))
        if vram is not None:
            steps.append(("vram", device_sizes(params.vram_budget)))

        why = self._change(model, steps)
        # a host that is to have less may need the devices to take their layers first
        if why and len(steps) == 2 and why[0] == "mem" and self._change(model, steps[::-1]) is None:
            why = None
        if why:
            which, text = why
            value = f"mem_budget={mem_budget!r}" if which == "mem" else f"vram={vram!r}"
            raise ModelError(f"{value}: {text.removeprefix('mem_budget: ').removeprefix('vram_budget: ')}")

    def _change(self, model: Any, steps: list[tuple[str, Any]]) -> tuple[str, str] | None:
        """Take all steps, and put back those that were taken when one fails. Returns which failed, and why."""
        taken: list[tuple[str, Any]] = []
        for name, value in steps:
            before = getattr(self, name)
            try:
                failed = _set(model, name, value) < 0
            except BaseException:  # Ctrl-C, heard by a callback or on the way out
                self._put_back(model, [*taken, (name, before)])
                raise
            taken.append((name, before))  # one that failed may have moved some layers already
            if failed:
                why = last_error()
                self._put_back(model, taken)
                return name, why
            setattr(self, name, value)
        return None

    def _put_back(self, model: Any, taken: list[tuple[str, Any]]) -> None:
        for name, before in reversed(taken):
            with contextlib.suppress(KeyboardInterrupt):  # it is being raised already, or the next call hears it
                _set(model, name, before)
            setattr(self, name, before)


def _set(model: Any, name: str, value: Any) -> int:
    function = lib.superllama_set_budget if name == "mem" else lib.superllama_set_vram_budget
    return int(function(model, value))
