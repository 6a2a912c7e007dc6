import gguf
import numpy as np
import pytest
from bench import moe_design, programs
from bench.make_model import Spec, make_model
from bench.sizes import parse_size
from bench.trace import tensors
from bench_helpers import needs_program

TINY = {
    "dense": Spec("dense", 6_000_000, n_layer=4, n_embd=128, n_head=2, n_head_kv=1),
    "moe": Spec("moe", 9_000_000, n_layer=3, n_embd=128, n_head=2, n_head_kv=1, n_expert=8, n_expert_used=2),
}


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_same_seed_same_bytes(tmp_path, vocab, kind):
    spec = TINY[kind]
    make_model(tmp_path / "a", vocab, spec)
    made = make_model(tmp_path / "b", vocab, spec)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    make_model(tmp_path / "c", vocab, Spec(**{**spec.__dict__, "seed": 1}))
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()
    assert made.n_layer == spec.n_layer


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_what_is_in_the_file(tmp_path, vocab, kind):
    make_model(tmp_path / "m", vocab, TINY[kind])
    reader = gguf.GGUFReader(tmp_path / "m")
    assert (tmp_path / "m").stat().st_size == pytest.approx(TINY[kind].size, rel=0.45)  # tiny: metadata counts
    for tensor in reader.tensors:
        if tensor.tensor_type == gguf.GGMLQuantizationType.Q4_0:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            assert np.isfinite(values).all(), tensor.name
            assert np.abs(values).max() > 0, tensor.name
    where = tensors.read_map(tmp_path / "m")
    assert where.n_layer == TINY[kind].n_layer
    assert int(where.experts.max()) + 1 == (8 if kind == "moe" else 0)


def test_size_is_met(tmp_path, vocab):
    make_model(tmp_path / "m", vocab, Spec("dense", parse_size("60MB")))
    assert (tmp_path / "m").stat().st_size == pytest.approx(60e6, rel=0.1)


def test_too_small(tmp_path, vocab):
    with pytest.raises(ValueError, match=r"too small for 64 layers .* at least .* fewer --layers"):
        make_model(tmp_path / "m", vocab, Spec("moe", 1_000_000, n_layer=64))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "12 parsecs", "GB", "-1MB"])
def test_wrong_size(text):
    with pytest.raises(ValueError, match="give a number and one of"):
        parse_size(text)


def test_attention_looks_back_a_few_tokens():
    kernel = moe_design.recency_kernel(64, 10000.0)
    width = 1 / (kernel**2).sum()
    assert 3 < width < 40
    assert kernel[:32].sum() > 0.7


@needs_program("routing")
def test_experts_are_asked_for_as_real_models_do(tmp_path, demo_model):
    """Published of 512 experts: least recently used first to leave, 12.5 % of them serve 67 % and 25 % serve 81 %."""
    from bench import moe_routing

    spec = Spec("moe", parse_size("120MB"), n_embd=512, n_layer=4, n_expert=256, n_expert_used=5)
    make_model(tmp_path / "m.gguf", demo_model, spec)
    assert programs.find("routing")
    ids = moe_routing.measure(tmp_path / "m.gguf", 256, 1, "Once upon a time")
    found = moe_routing.describe(ids, 256)
    few, more, *_ = rates = list(found.lru_hit.values())
    assert 0.6 < few < 0.75
    assert 0.74 < more < 0.88
    assert rates == sorted(rates)
    assert 0.15 < found.neighbour_jaccard < 0.4
    assert found.touched_64 > 0.2
