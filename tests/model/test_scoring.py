"""score() and perplexity(): the numbers are those of the logits, and of llama.cpp's program."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import numpy as np
import pytest

import superllama
from superllama._programs import find_program

SENTENCE = "The capital of France is Paris, and the capital of Italy is Rome."


@pytest.fixture(scope="module")
def context(demo: superllama.Model) -> superllama.Context:
    return superllama.Context(demo, n_ctx=256, n_ubatch=32, n_threads=1)


def test_the_numbers_are_those_of_the_logits(demo: superllama.Model, context: superllama.Context) -> None:
    tokens = demo.tokenize(SENTENCE)
    found = context.score(SENTENCE, top=3)
    assert context.seq_pos_max() == -1
    context.decode(tokens, logits="all")
    rows = context.logits().astype(np.float64)
    rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    assert [t.token for t in found] == tokens[1:]  # this vocabulary has no token that begins a text
    assert [t.logprob for t in found] == pytest.approx([float(rows[i, t]) for i, t in enumerate(tokens[1:])], abs=1e-9)
    for row, told in zip(rows, found, strict=False):
        assert [t.token for t in told.top] == np.argsort(-row)[:3].tolist()
        assert [t.logprob for t in told.top] == sorted((t.logprob for t in told.top), reverse=True)
    assert "".join(t.text for t in found) == SENTENCE.removeprefix("The")


def test_more_than_one_batch_and_what_comes_before(context: superllama.Context) -> None:
    long = SENTENCE * 8  # more than n_ubatch
    whole = context.score(long)
    assert len(whole) > 3 * context.n_ubatch
    context.decode([1, 2, 3])  # which goes
    rest = context.score(SENTENCE, after=SENTENCE * 7)
    assert [t.logprob for t in rest] == pytest.approx([t.logprob for t in whole[-len(rest) :]], abs=1e-3)
    as_tokens = context.score(context.model.tokenize(SENTENCE), after=context.model.tokenize(SENTENCE * 7))
    assert as_tokens == rest
    right, wrong = (sum(t.logprob for t in context.score(a, after="The capital of France is"))
                    for a in (" Paris", " Oslo"))  # fmt: skip
    assert right > wrong + 1


def test_a_vocabulary_that_begins_texts(tiny_model: Path) -> None:
    with superllama.Context(superllama.Model(tiny_model), n_ctx=128, n_threads=1) as context:
        tokens = context.model.tokenize("the one")
        assert tokens[0] == context.model.token_bos
        assert [t.token for t in context.score("the one")] == tokens[1:]
        assert [t.token for t in context.score(" one", after="the")] == context.model.tokenize(
            " one", add_special=False
        )


@pytest.mark.parametrize("budget", [None, "105MiB"])
def test_perplexity_is_that_of_the_program(demo_model: Path, tmp_path: Path, budget: str | None) -> None:
    """Also where the model streams."""
    text = (Path(__file__).parents[2] / "README.md").read_text()[:3500]
    (tmp_path / "text").write_text(text)
    command = [find_program("llama-perplexity"), "-m", demo_model, "-f", tmp_path / "text", "-c", 128, "-t", 1]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    said = re.search(r"PPL = ([0-9.]+) \+/- ([0-9.]+)", done.stdout + done.stderr)
    assert said is not None, done.stderr
    options = {} if budget is None else {"dynamic_layers": True, "mem_budget": budget}
    model = superllama.Model(demo_model, **options)
    with superllama.Context(model, n_ctx=128, n_ubatch=64, n_threads=1) as context:
        found = context.perplexity(text, window=128)
        assert (budget is not None) == any(layer.tier == "disk" for layer in model.layers())
    assert found.value == pytest.approx(float(said[1]), rel=1e-3)
    assert found.error == pytest.approx(float(said[2]), rel=1e-2)
    assert found.n_tokens == len(model.tokenize(text)) // 128 * 63 > 0


def test_bad_input(context: superllama.Context, demo: superllama.Model) -> None:
    with pytest.raises(superllama.PromptError, match="nothing to score"):
        context.score("", after="a")
    with pytest.raises(superllama.PromptError, match="0 or more"):
        context.score("a b", top=-1)
    with pytest.raises(superllama.PromptError, match="vocabulary"):
        context.score([1, 10**6])
    with pytest.raises(superllama.PromptTooLongError):
        context.score([1] * 300)
    with pytest.raises(superllama.PromptError, match="two windows of 64"):
        context.perplexity("too short", window=64)
    with pytest.raises(superllama.PromptError, match="no more than this context: 256"):
        context.perplexity(SENTENCE, window=512)
    assert context.seq_pos_max() == -1
    with (
        superllama.Context(demo, n_ctx=64, embeddings=True, pooling="mean") as vectors,
        pytest.raises(superllama.ContextError, match="keeps no logits"),
    ):
        vectors.score("a b")
