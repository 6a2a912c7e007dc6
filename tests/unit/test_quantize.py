"""quantize(): what llama.cpp's program makes, in the place of what was there, or nothing changed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import gguf
import pytest

import superllama
from superllama._programs import find_program
from superllama._quantize import types


def test_the_file_is_that_of_the_program(demo_model: Path, tmp_path: Path) -> None:
    by_program, target = tmp_path / "program.gguf", tmp_path / "ours.gguf"
    command = [find_program("llama-quantize"), "--allow-requantize", demo_model, by_program, "Q8_0", "1"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    target.write_text("what was there")
    made = superllama.quantize(demo_model, target, "q8_0", allow_requantize=True, n_threads=1)
    assert made == target
    assert target.read_bytes() == by_program.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours.gguf", "program.gguf"]


def test_options_change_what_is_made(demo_model: Path, tmp_path: Path) -> None:
    superllama.quantize(demo_model, tmp_path / "a.gguf", "Q8_0", allow_requantize=True, leave_output_tensor=True)
    kinds = {t.name: t.tensor_type for t in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    before = {t.name: t.tensor_type for t in gguf.GGUFReader(demo_model).tensors}
    assert kinds["token_embd.weight"] == before["token_embd.weight"]  # it is the output matrix of this model as well
    assert kinds["blk.0.attn_q.weight"] == gguf.GGMLQuantizationType.Q8_0


@pytest.mark.parametrize(
    ("type", "options", "error", "why"),
    [
        ("Q8_0", {}, superllama.ModelError, "requantizing from type q4_1 is disabled"),
        ("IQ2_XXS", {"allow_requantize": True}, superllama.ModelError, "requires an imatrix"),
        ("Q9", {}, ValueError, "Q4_K_M"),
        (8, {}, ValueError, "no type 8"),
        ("Q8_0", {"imatrix": "none.dat"}, OSError, "none.dat"),
    ],
)
def test_what_cannot_be_made_changes_nothing(
    demo_model: Path, tmp_path: Path, type: str, options: dict[str, object], error: type[Exception], why: str
) -> None:
    target = tmp_path / "made.gguf"
    target.write_text("what was there")
    with pytest.raises(error, match=why):
        superllama.quantize(demo_model, target, type, **options)
    assert target.read_text() == "what was there"
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_no_model(tmp_path: Path, demo_model: Path) -> None:
    odd = tmp_path / "odd.gguf"
    odd.write_text("hello")
    with pytest.raises(superllama.ModelError, match=r"odd\.gguf cannot be made Q8_0: .*failed to load"):
        superllama.quantize(odd, tmp_path / "made.gguf", "Q8_0")
    with pytest.raises(superllama.ModelError, match="is a folder"):
        superllama.quantize(tmp_path, tmp_path / "made.gguf", "Q8_0")
    with pytest.raises(superllama.ModelError, match="onto itself"):
        superllama.quantize(odd, odd, "Q8_0")
    with pytest.raises(FileNotFoundError):
        superllama.quantize(demo_model, tmp_path / "nowhere/made.gguf", "Q8_0", allow_requantize=True)
    assert list(tmp_path.iterdir()) == [odd]


def test_every_type_is_one_that_the_program_knows() -> None:
    done = subprocess.run([find_program("llama-quantize"), "--help"], capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert {"Q4_K_M", "Q8_0", "F16", "BF16"} < set(types())
    assert [name for name in types() if f" {name} " not in said] == []
