"""What the tests of dynamic layers share: budgets that make a model stream."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import superllama
from superllama import _plan

CONTEXT: dict[str, Any] = {"n_ctx": 256, "n_ubatch": 64, "n_threads": 1}
MIB = 1 << 20


def layout(path: Path, context: dict[str, Any] = CONTEXT, **kwargs: Any) -> SimpleNamespace:
    """What the library plans for a context."""
    params, c = superllama.ModelParams(**kwargs), superllama.ContextParams(**context)
    return _plan.library_plan(path, params, c, [1])[0]


def budgets(path: Path, context: dict[str, Any] = CONTEXT, **kwargs: Any) -> tuple[int, int]:
    """The least that works, and what holds everything."""
    plan = layout(path, context, **kwargs)
    return plan.mem_least_bytes, plan.mem_full_bytes
