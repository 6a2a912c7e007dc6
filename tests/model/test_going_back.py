"""Going back in a sequence: what a cache cannot undo is an error that loses nothing; what failed leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import superllama
from superllama import Context, Model

N_UBATCH = 32
WINDOWED = {"swa_full": False}
# of each kind of memory that cannot undo everything; windows of 32 tokens
KINDS: dict[str, dict[str, Any]] = {
    "gemma2-dense": WINDOWED,
    "gpt-oss-moe": WINDOWED,
    "mamba-dense": {},
    "lfm2-dense": {},
    "llama-dense": {},
}

Make = Callable[..., Context]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(kind: str, architectures: dict[str, Path]) -> Iterator[Model]:
    with Model(architectures[kind]) as m:
        yield m


@pytest.fixture
def make(model: Model, kind: str) -> Iterator[Make]:
    made: list[Context] = []

    def make(**kwargs: Any) -> Context:
        options = {"n_ctx": 2048, "n_batch": N_UBATCH, "n_ubatch": N_UBATCH, **KINDS[kind], **kwargs}
        made.append(Context(model, **options))
        return made[-1]

    yield make
    for ctx in made:
        ctx.close()


def tokens(model: Model, n: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(1).integers(3, model.n_vocab, n)]


def held(ctx: Context) -> tuple[int, int]:
    return ctx.seq_pos_min(), ctx.seq_pos_max()


def next_logits(ctx: Context) -> bytes:
    ctx.decode([7])
    return ctx.logits().tobytes()


def test_going_back_is_exact_or_an_error_that_loses_nothing(model: Model, make: Make, kind: str) -> None:
    given = tokens(model, 300)
    for to in (290, 250, 100, 1):
        ctx, fresh, untouched = make(), make(), make()
        ctx.decode(given)
        before = held(ctx)
        try:
            ctx.seq_remove(0, to)
        except superllama.ContextError as e:
            assert held(ctx) == before
            assert ("swa_full=True" in str(e)) == (KINDS[kind] is WINDOWED)  # advised where it helps only
            untouched.decode(given)
            assert next_logits(ctx) == next_logits(untouched)
        else:
            assert ctx.seq_pos_max() == to - 1
            fresh.decode(given[:to])
            ctx.decode([7])
            fresh.decode([7])
            np.testing.assert_allclose(ctx.logits(), fresh.logits(), rtol=0, atol=1e-4)
        for c in (ctx, fresh, untouched):
            c.close()


def test_all_of_a_sequence_can_always_be_removed(model: Model, make: Make) -> None:
    ctx = make()
    ctx.decode(tokens(model, 300))
    ctx.seq_remove(0)
    assert held(ctx) == (-1, -1)
    fresh = make()
    assert next_logits(ctx) == next_logits(fresh)


@pytest.mark.parametrize("error", [superllama.CancelledError, KeyboardInterrupt, superllama.DecodeError])
def test_a_prompt_that_fails_leaves_the_sequence_as_it_was(
    model: Model, make: Make, error: type[BaseException]
) -> None:
    """After so many tokens that a window has passed, and a recurrent state gone on."""
    given = tokens(model, 500)
    ctx, fresh = make(), make()
    for c in (ctx, fresh):
        c.decode(given[:200])
    real, n_calls = ctx._decode_batch, 0

    def failing(*args: Any) -> None:
        nonlocal n_calls
        n_calls += 1
        if n_calls == 7:
            raise error
        real(*args)

    ctx._decode_batch = failing  # type: ignore[method-assign]
    with pytest.raises(error):
        ctx.decode(given[200:])
    assert ctx.seq_pos_max() == 199
    np.testing.assert_allclose(
        np.frombuffer(next_logits(ctx), np.float32), np.frombuffer(next_logits(fresh), np.float32), rtol=0, atol=1e-4
    )


def test_a_state_goes_on_and_knows_how_far_back_it_reaches(model: Model, make: Make) -> None:
    given = tokens(model, 300)
    ctx, other = make(swa_full=True), make(swa_full=True)
    ctx.decode(given)
    other.state_load(ctx.state_save(0), 0)
    before = held(other)
    try:
        other.seq_remove(0, 100)
    except superllama.ContextError as e:
        assert held(other) == before
        assert "swa_full=True" not in str(e)  # it is on, and does not help
    else:
        assert other.seq_pos_max() == 99
        ctx.seq_remove(0, 100)
    ctx.decode([7])
    other.decode([7])
    np.testing.assert_allclose(ctx.logits(), other.logits(), rtol=0, atol=1e-4)


def test_states_are_exact_where_that_is_promised(model: Model, make: Make, kind: str, tmp_path: Path) -> None:
    if kind not in ("llama-dense", "mamba-dense"):
        pytest.skip("windows and hybrids: other bits, as state_save() says")
    ctx, memory, file, one = make(), make(), make(), make()
    ctx.decode(tokens(model, 300))
    memory.state_load(ctx.state_save())
    ctx.state_save_file(tmp_path / "s")
    file.state_load_file(tmp_path / "s")
    one.state_load(ctx.state_save(0), 0)
    expected = [next_logits(ctx) for _ in range(8)]
    for c in (memory, file, one):
        assert [next_logits(c) for _ in range(8)] == expected


def test_a_beginning_that_was_removed_is_not_missed(model: Model, make: Make, kind: str) -> None:
    """The window is what a token looks at of what the caller left there."""
    if kind in ("mamba-dense", "lfm2-dense"):
        pytest.skip("a state has no beginning to remove")
    ctx = make()
    ctx.decode(tokens(model, 40))
    ctx.seq_remove(0, 0, 30)
    ctx.seq_remove(0, 35)
    assert held(ctx) == (30, 34)
