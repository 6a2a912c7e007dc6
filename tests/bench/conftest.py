"""What the tests of bench/ share: a small vocabulary, a state folder of their own."""

from __future__ import annotations

from pathlib import Path

import pytest
from native_build import native_programs

pytest.importorskip("gguf", reason="the bench extra is not installed: pip install superllama[bench]")
pytest.importorskip("pyarrow", reason="the bench extra is not installed: pip install superllama[bench]")


@pytest.fixture(autouse=True)
def state_dir(tmp_path, monkeypatch):
    """Undo journals of a test never meet those of a real run."""
    from bench import undo

    folder = tmp_path / "state"
    monkeypatch.setattr(undo, "STATE_DIR", folder)
    monkeypatch.setenv("SUPERLLAMA_BENCH_STATE", str(folder))
    return folder


@pytest.fixture(scope="session")
def vocab(tmp_path_factory) -> Path:
    """A GGUF with a vocabulary of 256 tokens and nothing else."""
    import gguf

    path = tmp_path_factory.mktemp("vocab") / "vocab.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"t{i}" for i in range(256)])
    writer.add_token_types([1] * 256)
    writer.add_token_merges(["t 1", "t 2"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def build() -> Path:
    from bench import programs

    return programs.build_dir()


@pytest.fixture(scope="session")
def native():
    """The folder of the native test programs; those of the bench are built with them."""
    return native_programs()
