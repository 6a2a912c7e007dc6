"""A small mixture of experts, and the first lines of scripts that compute with one on a device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench import make_model
from rpc_devices import PRELUDE
from running import Runner

SCRIPT = (
    PRELUDE
    + """
import numpy as np
from superllama._native import ffi, lib
TOKENS = [int(t) for t in np.random.default_rng(3).integers(300, 2000, 64)]

def open_context(model, **kwargs):
    return superllama.Context(model, n_ctx=256, n_ubatch=64, n_threads=2, **kwargs)

def host_budget(model, part):
    "Host memory between the least that works and all that is of use."
    range_ = ffi.new("uint64_t[2]")
    assert lib.superllama_budget_range(model._c, range_, range_ + 1) == 0
    return int(range_[0] + (range_[1] - range_[0]) * part)
"""
)


def make_mixture(path: Path, vocabulary: Path, n_layer: int, n_expert: int, n_used: int, n_ff: int) -> Path:
    spec = make_model.Spec(kind="moe", n_layer=n_layer, n_embd=256, n_expert=n_expert, n_expert_used=n_used, n_ff=n_ff)
    make_model.make_model(path, vocabulary, spec)
    return path


def run_script(run_python: Runner, script: str, path: Path, endpoint: str) -> dict[str, Any]:
    """What it prints, as JSON. `endpoint`: of an RPC server, or "gpu"."""
    done = run_python(SCRIPT + script, path, endpoint, 0)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found
