"""A model that was made larger gives the logits of the small one, to the bit."""

from pathlib import Path

import gguf
import pytest
from bench.make_model import Spec, make_model
from bench.widen_model import mix, widen
from native_build import run_native


def test_same_logits(tmp_path: Path, demo_model: Path) -> None:
    wide = tmp_path / "wide.gguf"
    n_ff = widen(demo_model, wide, 200_000_000)
    assert wide.stat().st_size == pytest.approx(200e6, rel=0.03)
    fields = gguf.GGUFReader(wide).fields
    assert fields["llama.feed_forward_length"].contents() == n_ff > 1536
    for key, field in gguf.GGUFReader(demo_model).fields.items():
        if key.startswith(("tokenizer.", "llama.")) and not key.endswith("feed_forward_length"):
            assert fields[key].contents() == field.contents(), key
    for repack in (0, 1):
        small, large = (run_native("probe", "-m", m, "-n", 4, "-t", 2, "--repack", repack) for m in (demo_model, wide))
        assert small["hash"] == large["hash"]


def test_not_smaller(tmp_path: Path, demo_model: Path) -> None:
    with pytest.raises(ValueError, match=r"--size 1.0 MB is less than the model has: 9\d\.\d MB"):
        widen(demo_model, tmp_path / "wide.gguf", 1_000_000)
    assert not list(tmp_path.iterdir())


def test_not_with_experts(tmp_path: Path, vocab: Path) -> None:
    moe = tmp_path / "moe.gguf"
    make_model(moe, vocab, Spec("moe", 9_000_000, n_layer=3, n_embd=128, n_head=2, n_head_kv=1, n_expert=8))
    with pytest.raises(ValueError, match="no dense feed-forward layers"):
        widen(moe, tmp_path / "wide.gguf", 20_000_000)


def test_a_mixture_of_copies_answers_as_the_model(tmp_path: Path, demo_model: Path) -> None:
    mixture = tmp_path / "mixture.gguf"
    mix(demo_model, mixture, n_expert=4, n_used=2)
    assert mixture.stat().st_size > 2 * demo_model.stat().st_size
    fields = gguf.GGUFReader(mixture).fields
    assert (fields["llama.expert_count"].contents(), fields["llama.expert_used_count"].contents()) == (4, 2)
    small, large = (run_native("probe", "-m", m, "-n", 8, "-t", 2) for m in (demo_model, mixture))
    assert small["tokens"] == large["tokens"]
    with pytest.raises(ValueError, match="--active 5: of 4 experts a token takes 1 to 4"):
        mix(demo_model, tmp_path / "more.gguf", n_expert=4, n_used=5)
    assert not (tmp_path / "more.gguf").exists()
