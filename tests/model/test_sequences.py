"""Sequences and state: what is copied, moved, saved and loaded computes on exactly as the original would."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_model as tiny
from running import Runner

import superllama
from superllama import Context, Model, _states

GREEDY = {"temperature": 0, "ignore_eos": True, "max_tokens": 8}


def go_on(ctx: Context, seq: int = 0) -> list[int | None]:
    return [p.token for p in ctx.generate("", keep=True, seq=seq, **GREEDY)]


# ---------------------------------------------------------------- logits and embeddings


def test_logits_are_a_view_of_the_last_batch(ctx: Context) -> None:
    tokens = ctx.model.tokenize("the one of")
    ctx.decode(tokens, logits="all")
    every = ctx.logits()
    assert every.shape == (len(tokens), ctx.model.n_vocab)
    assert every.dtype == np.float32
    assert not every.flags.owndata
    assert not every.flags.writeable
    assert ctx.logits().ctypes.data == every.ctypes.data
    last_of_all = every[-1].copy()
    ctx.clear()
    ctx.decode(tokens)
    assert ctx.logits().shape == (1, ctx.model.n_vocab)
    np.testing.assert_allclose(ctx.logits()[0], last_of_all, rtol=0, atol=1e-4)
    ctx.clear()
    ctx.decode(tokens, logits=False)
    with pytest.raises(superllama.ContextError, match="no logits"):
        ctx.logits()


def test_a_view_keeps_its_context(tiny_model: Path) -> None:
    def make() -> np.ndarray:
        ctx = Context(tiny_model)
        ctx.decode(ctx.model.tokenize("the"))
        return ctx.logits()

    assert np.isfinite(make()).all()


def test_token_embeddings_without_pooling(model: Model) -> None:
    with Context(model, embeddings=True) as ctx:
        tokens = model.tokenize("the one of")
        ctx.decode(tokens)
        assert ctx.embeddings().shape == (len(tokens), model.n_embd)
        with pytest.raises(superllama.ContextError, match="pooling"):
            ctx.embed("the one")


def test_pooled_embeddings(model: Model) -> None:
    with Context(model, embeddings=True, pooling="none") as ctx:
        ctx.decode(model.tokenize("the one of"))
        mean = ctx.embeddings().mean(axis=0)
    with Context(model, embeddings=True, pooling="mean") as ctx:
        one = ctx.embed("the one of", normalize=False)
        np.testing.assert_allclose(one, mean, rtol=0, atol=1e-3)
        many = ctx.embed(["the one of", "was"])
        assert many.shape == (2, model.n_embd)
        np.testing.assert_allclose(np.linalg.norm(many, axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(many[0], one / np.linalg.norm(one), atol=1e-5)
        assert ctx.embed([]).shape == (0, model.n_embd)
        with pytest.raises(superllama.PromptTooLongError, match=str(ctx.n_ubatch)):
            ctx.embed("the one of " * 300)


def test_an_encoder(tiny_bert: Path) -> None:
    with Context(tiny_bert, embeddings=True) as ctx:
        a, b, again = ctx.embed(["a b c", "x y", "a b c"])
        np.testing.assert_array_equal(a, again)
        assert not np.allclose(a, b)
        with pytest.raises(superllama.ContextError, match="does not generate"):
            ctx.generate("a b")
        with pytest.raises(superllama.PromptTooLongError, match="the context has 64"):
            ctx.embed("a " * 100)  # it has no positions beyond those it was trained with


def test_no_embeddings_unless_asked_for(ctx: Context) -> None:
    for ask in (ctx.embeddings, lambda: ctx.embed("the")):
        with pytest.raises(superllama.ContextError, match="embeddings=True"):
            ask()


# ---------------------------------------------------------------- sequences


@pytest.mark.parametrize("kv_unified", [False, True])
def test_a_copy_goes_on_like_the_original(model: Model, kv_unified: bool) -> None:
    with Context(model, n_ctx=1024, n_seq_max=4, kv_unified=kv_unified) as ctx:
        list(ctx.generate("of and", seq=2, **GREEDY))  # is replaced
        list(ctx.generate("the one", seq=0, **GREEDY))
        ctx.seq_copy(0, 2)
        assert ctx.seq_pos_max(2) == ctx.seq_pos_max(0)
        assert go_on(ctx, 2) == go_on(ctx, 0)
        if kv_unified:
            ctx.seq_copy(0, 3, 0, 2)
            assert ctx.seq_pos_max(3) == 1
        else:
            with pytest.raises(superllama.ContextError, match="kv_unified=True"):
                ctx.seq_copy(0, 3, 0, 2)


def test_remove_keep_shift_clear(model: Model) -> None:
    with Context(model, n_ctx=1024, n_seq_max=3) as ctx:
        tokens = model.tokenize("the one of and")
        for seq in range(3):
            ctx.decode(tokens, seq=seq)
        n = len(tokens)
        ctx.seq_remove(0, n - 2)
        assert ctx.seq_pos_max(0) == n - 3
        ctx.seq_remove(0, 0, 1)
        assert ctx.seq_pos_min(0) == 1
        ctx.seq_shift(0, -1)
        assert (ctx.seq_pos_min(0), ctx.seq_pos_max(0)) == (0, n - 4)
        ctx.decode(tokens[-1:], seq=0)
        ctx.seq_keep(1)
        assert [ctx.seq_pos_max(seq) for seq in range(3)] == [-1, n - 1, -1]
        ctx.clear()
        assert ctx.seq_pos_max(1) == -1


def test_removed_tokens_leave_no_trace(ctx: Context) -> None:
    tokens = ctx.model.tokenize("the one of and to")
    ctx.decode(tokens[:3])
    expected = ctx.logits().copy()
    ctx.decode(tokens[3:])
    ctx.seq_remove(0, 2)
    ctx.decode(tokens[2:3])
    np.testing.assert_allclose(ctx.logits(), expected, rtol=0, atol=5e-3)  # the batches differ


# ---------------------------------------------------------------- state


def test_a_loaded_state_goes_on_exactly(model: Model) -> None:
    with Context(model, n_ctx=1024, n_seq_max=2) as ctx, Context(model, n_ctx=1024, n_seq_max=2) as other:
        list(ctx.generate("the one", seq=0, **GREEDY))
        list(ctx.generate("of and", seq=1, **GREEDY))
        state = ctx.state_save()
        expected = [go_on(ctx, 0), go_on(ctx, 1)]
        for target in (ctx, other):
            target.state_load(state)
            assert [go_on(target, 0), go_on(target, 1)] == expected


def test_one_sequence_can_move(model: Model, tmp_path: Path) -> None:
    file = tmp_path / "seq.state"
    with Context(model, n_ctx=1024, n_seq_max=2) as ctx:
        list(ctx.generate("the one", seq=0, **GREEDY))
        list(ctx.generate("was", seq=1, **GREEDY))
        ctx.state_save_file(file, seq=0)
        expected = go_on(ctx, 0)
        ctx.state_load_file(file, seq=1)
        assert go_on(ctx, 1) == expected
    assert [p.name for p in tmp_path.iterdir()] == ["seq.state"]


@pytest.mark.parametrize("cut", [0, 5, 30, -1])
def test_damaged_states_are_refused(ctx: Context, cut: int) -> None:
    list(ctx.generate("the one", **GREEDY))
    state = ctx.state_save()
    expected = go_on(ctx)
    ctx.state_load(state)
    flipped = bytearray(state)
    flipped[-40] ^= 1
    for damaged in (state[:cut], bytes(flipped), b"x" + state):
        with pytest.raises(superllama.StateError):
            ctx.state_load(damaged)
    assert go_on(ctx) == expected  # it kept what it held


def test_a_header_nested_deeply_is_a_damaged_state(ctx: Context, tmp_path: Path) -> None:
    ctx.decode([5])
    head = b'{"pending": ' + b"[" * 5000 + b"]" * 5000 + b"}"
    state = _states.MAGIC + _states.LENGTH.pack(len(head)) + head
    (tmp_path / "s").write_bytes(state)
    with pytest.raises(superllama.StateError, match="damaged"):
        ctx.state_load(state)
    with pytest.raises(superllama.StateError, match="damaged"):
        ctx.state_load_file(tmp_path / "s")
    assert ctx.seq_pos_max() == 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel how much memory there was")
@pytest.mark.parametrize("seq", [None, 0])
def test_saving_needs_the_memory_of_one_state(tmp_path: Path, run_python: Runner, seq: int | None) -> None:
    """The library writes into the result; a state may be most of the memory."""
    script = """
import sys, superllama
ctx = superllama.Context(sys.argv[1], n_ctx=2048, n_ubatch=64)
ctx.decode([5] * 2000)
def peak(): # of this program; ru_maxrss is that of the one which started it, if that was more
    status = open("/proc/self/status").read()
    return int(status[status.index("VmHWM:") + 6 :].split()[0]) << 10
before = peak()
state = ctx.state_save(eval(sys.argv[2]))
print(len(state) >> 20, (peak() - before) / len(state))
ctx.clear()
ctx.state_load(state, eval(sys.argv[2]))
assert ctx.seq_pos_max() == 1999
"""
    done = run_python(script, tiny.write_zeros(tmp_path / "zeros.gguf", 1024, 6, 64), seq)
    assert done.returncode == 0, done.stderr
    mib, states = done.stdout.split()
    assert int(mib) > 20
    assert 0.5 < float(states) < 1.5


def test_states_of_others_are_refused(ctx: Context, tiny_bert: Path, model: Model) -> None:
    list(ctx.generate("the one", **GREEDY))
    whole, one = ctx.state_save(), ctx.state_save(seq=0)
    with pytest.raises(superllama.StateError, match="one sequence"):
        ctx.state_load(one)
    with pytest.raises(superllama.StateError, match="whole context"):
        ctx.state_load(whole, seq=0)
    with (
        Context(tiny_bert) as other,
        pytest.raises(superllama.StateError, match="not of this model"),
    ):
        other.state_load(whole)
    with Context(model, type_k="f32", n_ctx=512) as other:
        with pytest.raises(superllama.StateError, match="cache types"):
            other.state_load(whole)
        assert other.seq_pos_max() == -1
