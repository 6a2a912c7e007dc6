"""Arguments of the wrong shape: tokens where text is expected and the other way round do what was meant, or say so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny_model as tiny

import superllama
from superllama import Context, Model

TOKENS = [72, 105]


@pytest.fixture
def embedder(model: Model) -> Iterator[Context]:
    with Context(model, embeddings=True, pooling="mean") as ctx:
        yield ctx


@pytest.mark.parametrize("text", [TOKENS, 5, None, 1.5, ["the"], np.array(TOKENS), {"role": "user"}])
def test_what_is_no_text_is_not_read_as_one(model: Model, text: Any) -> None:
    with pytest.raises(superllama.PromptError, match="must be str"):
        model.tokenize(text)


@pytest.mark.parametrize("text", [b"the", bytearray(b"the"), memoryview(b"the")])
def test_bytes_of_any_kind_are_text(model: Model, text: Any) -> None:
    assert model.tokenize(text) == model.tokenize("the")


NO_TOKENS = ["the", b"the", 5, None, [1.5], [[1, 2]], ["the"], [True], {1: 2}, [None], np.array([1.5])]


@pytest.mark.parametrize("wrong", NO_TOKENS)
def test_what_are_no_tokens_are_not_read_as_such(ctx: Context, wrong: Any) -> None:
    for use in (ctx.decode, ctx.model.detokenize, ctx.model.detokenize_bytes):
        with pytest.raises(superllama.PromptError, match="token"):
            use(wrong)
    if not isinstance(wrong, str | bytes):
        with pytest.raises(superllama.PromptError, match="prompt is one text"):
            ctx.generate(wrong)
    assert ctx.seq_pos_max() == -1


def test_tokens_of_numpy_are_tokens(ctx: Context) -> None:
    ctx.decode(np.array(TOKENS))
    expected = ctx.logits().copy()
    ctx.clear()
    ctx.decode(TOKENS)
    np.testing.assert_array_equal(ctx.logits(), expected)
    assert ctx.model.detokenize(np.array(TOKENS)) == ctx.model.detokenize(TOKENS)
    assert ctx.model.is_eog(np.int32(2))
    assert len(list(ctx.generate(np.array(TOKENS), max_tokens=2, ignore_eos=True))) == 2


def test_embed_takes_texts_and_tokens(embedder: Context) -> None:
    text = "the one of"
    tokens = embedder.model.tokenize(text)
    expected = embedder.embed(text)
    for one in (tokens, np.array(tokens), text.encode(), tuple(tokens)):
        np.testing.assert_array_equal(embedder.embed(one), expected)
    for several in ([tokens, text], [np.array(tokens), text.encode()], np.array([tokens, tokens])):
        np.testing.assert_array_equal(embedder.embed(several), np.stack([expected, expected]))


@pytest.mark.parametrize("wrong", [5, None, [None], [[1.5]], [{"text": "x"}], [["the"]], [[]], [1, "the"]])
def test_embed_says_what_it_takes(embedder: Context, wrong: Any) -> None:
    with pytest.raises(superllama.PromptError):
        embedder.embed(wrong)


WRONG: dict[str, Callable[[Context], Any]] = {
    "a number of a sequence that is text": lambda c: c.decode([5], seq="0"),
    "half a sequence": lambda c: c.seq_remove(0.5),
    "a switch for a sequence": lambda c: c.state_save(True),
    "a position that is text": lambda c: c.decode([5], pos="0"),
    "a range of floats": lambda c: c.seq_remove(0, 0.0, 1.5),
    "a shift by half": lambda c: c.seq_shift(0, 0.5),
    "logits of the first": lambda c: c.decode([5], logits="first"),
    "logits as a switch": lambda c: c.decode([5], logits=True),
    "a path for a state": lambda c: c.state_load("state.bin"),
    "no state": lambda c: c.state_load(None),
    "a number for a path": lambda c: c.state_load_file(0),
    "a text for a conversation": lambda c: c.chat("Hello"),
    "one message for a conversation": lambda c: c.chat({"role": "user", "content": "x"}),
    "texts for messages": lambda c: c.chat(["Hello"], template="chatml"),
    "an adapter alone": lambda c: c.set_lora("lora.gguf"),
    "adapters without scales": lambda c: c.set_lora(["lora.gguf"]),
    "an adapter's path": lambda c: c.set_lora([("lora.gguf", 1.0)]),
    "a model that is a number": lambda c: Model(5),
    "a model that is nothing": lambda c: Model(None),
    "a context on a context": lambda c: Context(c),
    "parameters of another kind": lambda c: Context(c.model, superllama.ModelParams()),
    "parameters that are a number": lambda c: c.generate("x", 5),
    "an adapter that is a number": lambda c: c.model.load_lora(5),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_shape_is_an_error_of_ours_with_a_hint(ctx: Context, what: str) -> None:
    with pytest.raises(superllama.Error) as e:
        WRONG[what](ctx)
    assert len(str(e.value)) > 20
    ctx.decode([5])  # it is as usable as before
    assert ctx.seq_pos_max() == 0


def test_parameters_may_be_a_mapping(ctx: Context) -> None:
    assert len(list(ctx.generate("the", {"max_tokens": 3, "ignore_eos": True}))) == 3


# ---------------------------------------------------------------- rerankers


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with a head that gives one score."""
    return tiny.write_bert(tmp_path_factory.mktemp("rank") / "rank.gguf", pooling=gguf.PoolingType.RANK)


def test_scores_of_a_reranker_are_what_the_model_gives(reranker: Path) -> None:
    with Context(reranker, embeddings=True) as ctx:
        scores = ctx.embed(["a b c", "x y", "q r s t"])
        assert scores.shape == (3, 1)
        assert len({float(s) for s in scores[:, 0]}) == 3
        assert not np.allclose(np.abs(scores), 1)
        np.testing.assert_array_equal(ctx.embed("x y"), scores[1])
        np.testing.assert_array_equal(ctx.embed("x y", normalize=False), scores[1])
        assert ctx.embed([]).shape == (0, 1)
        with pytest.raises(superllama.ContextError, match="scores"):
            ctx.embed("x y", normalize=True)
