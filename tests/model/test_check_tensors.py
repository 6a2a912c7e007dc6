"""`check_tensors` with dynamic layers: what is no number is an error that names the tensor, wherever it lies."""

from __future__ import annotations

import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_model as tiny
from bench import make_model
from running import Runner

SCRIPT = """
import sys
import superllama
from dynamic import CONTEXT, budgets

path, check, repack = sys.argv[1], sys.argv[2] == "1", sys.argv[3] == "1"
least, full = budgets(path, use_extra_bufts=repack)
kwargs = {"dynamic_layers": True, "use_extra_bufts": repack, "mem_budget": (least + full) // 2, "check_tensors": check}
try:
    with superllama.Model(path, **kwargs) as model, superllama.Context(model, **CONTEXT) as ctx:
        for _ in range(2):
            try:
                ctx.decode([70, 71, 72])
                print("decoded")
            except superllama.DecodeError as e:
                print(e)
except superllama.ModelError as e:
    print(e)
"""


def spoil(path: Path, name: str, row: int | None = None) -> None:
    """No number at the beginning of the tensor, or of one of its rows; of each expert's share, where it has experts."""
    (tensor,) = [t for t in gguf.GGUFReader(path).tensors if t.name == name]
    n_shares = int(tensor.shape[2]) if len(tensor.shape) == 3 else 1
    share = int(tensor.n_bytes) // n_shares
    first = 0 if row is None else row * int(tensor.n_bytes) // int(tensor.shape[1])
    value = np.float32("nan") if tensor.tensor_type == gguf.GGMLQuantizationType.F32 else np.float16("nan")
    with path.open("r+b") as f:
        for i in range(n_shares):
            f.seek(int(tensor.data_offset) + i * share + first)
            f.write(value.tobytes())


@pytest.fixture
def experts(demo_model: Path, tmp_path: Path) -> Path:
    spec = make_model.Spec(kind="moe", n_layer=4, n_embd=512, n_expert=16, n_expert_used=4, n_ff=224)
    make_model.make_model(tmp_path / "moe.gguf", demo_model, spec)
    return tmp_path / "moe.gguf"


def run(path: Path, run_python: Runner, shim: Path, check: bool, repack: bool) -> list[str]:
    env = {**os.environ, "LD_PRELOAD": str(shim), "FAULT_NO": "amx", "SUPERLLAMA_CACHE": str(path.parent / "cache")}
    env["PYTHONPATH"] = str(Path(__file__).parent.parent)
    done = run_python(SCRIPT, path, int(check), int(repack), env=env)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("repack", [False, True])
@pytest.mark.parametrize(
    "name", ["blk.2.ffn_down_exps.weight", "blk.1.attn_q.weight", "blk.3.ffn_norm.weight", "output_norm.weight"]
)
def test_experts_blocks_and_resident_tensors(
    name: str, repack: bool, experts: Path, run_python: Runner, fault_shim: Path
) -> None:
    assert run(experts, run_python, fault_shim, True, repack) == ["decoded"] * 2
    spoil(experts, name)
    lines = run(experts, run_python, fault_shim, True, repack)
    assert lines
    for line in lines:
        assert f"tensor '{name}' has invalid data" in line
    if not name.startswith("output"):
        assert run(experts, run_python, fault_shim, False, repack) == ["decoded"] * 2


def test_rows(tmp_path: Path, run_python: Runner, fault_shim: Path) -> None:
    path = tiny.write_llama(tmp_path / "tiny.gguf")
    spoil(path, "token_embd.weight", row=71)
    for line in run(path, run_python, fault_shim, True, False):
        assert "tensor 'token_embd.weight' has invalid data" in line
    spoil(tiny.write_llama(path), "token_embd.weight", row=73)  # on the same page, and not looked up
    assert run(path, run_python, fault_shim, True, False) == ["decoded"] * 2
