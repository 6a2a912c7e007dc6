"""Generation on a tiny random model: what comes out, how it ends, and that it is exact whatever happens between."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

import superllama
from superllama import Context, Model

GREEDY = {"temperature": 0, "ignore_eos": True}


def tokens_of(pieces: Iterator[superllama.Piece]) -> list[int]:
    return [p.token for p in pieces if p.token is not None]


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("text", ["the one", "", " a  b\n", "naïve €", "日本語", "a\0b"])
def test_tokenize_and_back(model: Model, text: str) -> None:
    tokens = model.tokenize(text, add_special=False)
    assert model.detokenize_bytes(tokens).decode().removeprefix(" ") == text.removeprefix(" ")
    assert model.tokenize(text) == [model.token_bos, *tokens]
    pieces = b"".join(model.token_bytes(t) for t in tokens).decode()
    assert pieces == (f" {text}" if text else "")  # this vocabulary begins every text with a space


def test_special_tokens_are_parsed_on_request(model: Model) -> None:
    assert model.tokenize("</s>", add_special=False, parse_special=True) == [model.token_eos]
    assert model.token_eos not in model.tokenize("</s>", add_special=False)
    assert model.is_eog(2)
    assert not model.is_eog(5)


def test_facts(model: Model) -> None:
    assert (model.n_layer, model.n_embd, model.n_ctx_train) == (4, 64, 512)
    assert model.metadata["general.architecture"] == "llama"
    assert model.n_vocab == len(model.tokenize("")) + 258 + 26 + 1 + 17
    assert 4 * model.n_params == model.size_bytes
    assert model.chat_template is None


# ---------------------------------------------------------------- generate


def test_length_and_summary(ctx: Context) -> None:
    pieces = list(ctx.generate("the one", max_tokens=7, **GREEDY))
    assert len(pieces) == 7
    assert [p.finish_reason for p in pieces] == [None] * 6 + ["length"]
    assert all(p.summary is None for p in pieces[:-1])
    summary = pieces[-1].summary
    assert summary is not None
    assert (summary.prompt_tokens, summary.generated_tokens) == (len(ctx.model.tokenize("the one")), 7)
    assert summary.tokens_per_sec > 0
    assert summary.prompt_tokens_per_sec > 0


def test_greedy_is_the_argmax_of_the_logits(ctx: Context) -> None:
    generated = tokens_of(ctx.generate("the one", max_tokens=12, **GREEDY))
    tokens = ctx.model.tokenize("the one")
    ctx.clear()
    for expected in generated:
        ctx.decode(tokens)
        assert ctx.logits()[-1].argmax() == expected
        tokens = [expected]


def test_no_tokens_asked_for(ctx: Context) -> None:
    (piece,) = ctx.generate("the", max_tokens=0)
    assert (piece.text, piece.token, piece.finish_reason) == ("", None, "length")


def test_a_full_context_ends_with_length(model: Model) -> None:
    with Context(model, n_ctx=256) as ctx:
        *_, last = ctx.generate("the", **GREEDY)
        assert last.finish_reason == "length"
        assert last.summary is not None
        # the last one needs no room: nothing is computed from it
        assert last.summary.prompt_tokens + last.summary.generated_tokens == ctx.n_ctx_seq + 1
        assert ctx.seq_pos_max() == ctx.n_ctx_seq - 1


def test_eos_ends(ctx: Context) -> None:
    eos = ctx.model.token_eos
    assert eos is not None
    pieces = list(ctx.generate("the", temperature=0, max_tokens=50, logit_bias={eos: 1000.0}))
    assert [(p.text, p.token, p.finish_reason) for p in pieces] == [("", eos, "eos")]


def test_stop_strings_end_and_are_left_out(ctx: Context) -> None:
    whole = "".join(p.text for p in ctx.generate("the", max_tokens=60, **GREEDY))
    stop = whole[20:23]
    pieces = list(ctx.generate("the", max_tokens=60, stop=stop, **GREEDY))
    assert "".join(p.text for p in pieces) == whole[: whole.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    assert [p.finish_reason for p in pieces[:-1]] == [None] * (len(pieces) - 1)
    unmatched = "".join(p.text for p in ctx.generate("the", max_tokens=60, stop=["\x01\x02\x03"], **GREEDY))
    assert unmatched == whole


def test_characters_come_whole(ctx: Context) -> None:
    euro = [3 + byte for byte in "€".encode()]  # byte tokens follow <unk>, <s>, </s>
    grammar = 'root ::= "€€€"'
    pieces = list(ctx.generate("the", grammar=grammar, temperature=0, max_tokens=30))
    assert [p.token for p in pieces[:9]] == euro * 3
    assert [p.text for p in pieces[:9]] == ["", "", "€"] * 3
    assert pieces[-1].finish_reason == "eos"


def test_a_character_cut_by_the_end_is_shown_as_such(ctx: Context) -> None:
    pieces = list(ctx.generate("the", grammar='root ::= "€€€"', temperature=0, max_tokens=4))
    assert [p.text for p in pieces] == ["", "", "€", "�"]


def test_seeds(ctx: Context) -> None:
    def sampled(seed: int | None) -> list[int]:
        return tokens_of(ctx.generate("the", seed=seed, temperature=1.5, top_k=0, max_tokens=20, ignore_eos=True))

    assert sampled(7) == sampled(7)
    assert sampled(7) != sampled(8)
    assert sampled(None) != sampled(None)
    *_, last = ctx.generate("the", temperature=1.5, top_k=0, max_tokens=20, ignore_eos=True)
    assert last.summary is not None
    again = tokens_of(
        ctx.generate("the", seed=last.summary.seed, temperature=1.5, top_k=0, max_tokens=20, ignore_eos=True)
    )
    assert again[-1] == last.token


def test_samplers_do_what_they_say(ctx: Context) -> None:
    greedy = tokens_of(ctx.generate("the", max_tokens=20, **GREEDY))
    for narrow in ({"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
        assert tokens_of(ctx.generate("the", max_tokens=20, temperature=1.5, ignore_eos=True, **narrow)) == greedy
    assert greedy[0] not in tokens_of(
        ctx.generate("the", max_tokens=1, logit_bias={greedy[0]: float("-inf")}, **GREEDY)
    )
    repeated = tokens_of(ctx.generate("the", max_tokens=60, penalty_last_n=-1, presence_penalty=1000.0, **GREEDY))
    assert len(set(repeated)) == 60
    assert not set(repeated) & set(ctx.model.tokenize("the"))  # the prompt counts
    beyond = {"penalty_last_n": 2**31 - 1, "presence_penalty": 1000.0}  # of memory for so many, nothing is taken
    assert tokens_of(ctx.generate("the", max_tokens=60, **beyond, **GREEDY)) == repeated


def test_grammar(ctx: Context) -> None:
    text = "".join(p.text for p in ctx.generate("the", grammar='root ::= "yes" | "no"', temperature=0, max_tokens=9))
    assert text in ("yes", "no")
    digits = "".join(
        p.text for p in ctx.generate("the", grammar="root ::= [0-9]+", seed=1, max_tokens=9, ignore_eos=True)
    )
    assert len(digits) == 9
    assert digits.isdecimal()


def test_a_grammar_that_allows_nothing_more(ctx: Context) -> None:
    with pytest.raises(superllama.GrammarError, match="no further token"):
        list(ctx.generate("the", grammar='root ::= "yes"', temperature=0, ignore_eos=True, max_tokens=9))
    assert len(list(ctx.generate("the", max_tokens=3, **GREEDY))) == 3  # still usable


@pytest.mark.parametrize(
    ("grammar", "says"),
    [
        ("root ::= (", "expecting '\\)'"),
        ("root ::= foo", "refers to a rule 'foo'"),
        ('x ::= "a"', "no rule 'root'"),
        ("root ::= [", "expecting|unexpected end"),
        ("root = x", "line 1, column 6: expecting ::="),
    ],
)
def test_what_is_wrong_with_a_grammar_is_in_the_exception(
    ctx: Context, grammar: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(superllama.GrammarError, match=says):
        ctx.generate("the", grammar=grammar)
    assert capfd.readouterr().err == ""  # and nowhere else


def test_long_prompts_are_split(model: Model) -> None:
    prompt = "the one of and to in is it you that he was for on are with as " * 4
    with Context(model, n_ctx=512) as whole, Context(model, n_ctx=512, n_batch=16, n_ubatch=8) as parts:
        assert len(model.tokenize(prompt)) > 3 * parts.n_batch
        expected = tokens_of(whole.generate(prompt, max_tokens=8, **GREEDY))
        assert tokens_of(parts.generate(prompt, max_tokens=8, **GREEDY)) == expected


# ---------------------------------------------------------------- going on


def test_keep_goes_on_exactly(ctx: Context) -> None:
    whole = tokens_of(ctx.generate("the one", max_tokens=12, **GREEDY))
    first = tokens_of(ctx.generate("the one", max_tokens=5, **GREEDY))
    second = tokens_of(ctx.generate("", keep=True, max_tokens=7, **GREEDY))
    assert first + second == whole


def test_leaving_the_loop_keeps_the_context(ctx: Context) -> None:
    whole = tokens_of(ctx.generate("the one", max_tokens=12, **GREEDY))
    first = tokens_of(itertools.islice(ctx.generate("the one", max_tokens=12, **GREEDY), 5))
    assert first + tokens_of(ctx.generate("", keep=True, max_tokens=7, **GREEDY)) == whole


def test_a_second_prompt_in_the_same_sequence(ctx: Context) -> None:
    first = tokens_of(ctx.generate("the one", max_tokens=3, **GREEDY))
    kept = tokens_of(ctx.generate(" of the", keep=True, max_tokens=6, **GREEDY))
    at_once = ctx.model.tokenize("the one") + first + ctx.model.tokenize(" of the", add_special=False)
    assert tokens_of(ctx.generate(at_once, max_tokens=6, **GREEDY)) == kept


@pytest.mark.parametrize("kv_unified", [False, True])
def test_sequences_take_turns(model: Model, kv_unified: bool) -> None:
    prompts = ["the one", "of and to in", "was"]
    with Context(model, n_ctx=768, n_seq_max=3, kv_unified=kv_unified) as ctx:
        alone = [tokens_of(ctx.generate(p, seq=i, max_tokens=10, **GREEDY)) for i, p in enumerate(prompts)]
        running = [ctx.generate(p, seq=i, max_tokens=10, **GREEDY) for i, p in enumerate(prompts)]
        together = [[p.token for p in pieces] for pieces in zip(*running, strict=True)]
        assert [list(tokens) for tokens in zip(*together, strict=True)] == alone


def test_a_sequence_changed_under_a_generator(ctx: Context) -> None:
    running = ctx.generate("the one", **GREEDY)
    next(running)
    ctx.seq_remove(0)
    with pytest.raises(superllama.DecodeError, match="was changed"):
        next(running)
    first = ctx.generate("the one", **GREEDY)
    next(first)
    next(ctx.generate("the one", **GREEDY))
    with pytest.raises(superllama.DecodeError, match="was changed"):
        next(first)


def test_a_closed_context_ends_its_generator(model: Model) -> None:
    ctx = Context(model)
    running = ctx.generate("the", **GREEDY)
    next(running)
    ctx.close()
    with pytest.raises(superllama.ContextError, match="closed"):
        next(running)


def test_lora_changes_the_logits_and_goes_away(ctx: Context, tiny_lora: Path) -> None:
    def logits() -> bytes:
        ctx.clear()
        ctx.decode(ctx.model.tokenize("the one of"))
        return ctx.logits().tobytes()

    before = logits()
    lora = ctx.model.load_lora(tiny_lora)
    ctx.set_lora([(lora, 1.0)])
    with_lora = logits()
    assert with_lora != before
    ctx.set_lora([(lora, 0.5)])
    assert logits() not in (before, with_lora)
    ctx.set_lora()
    assert logits() == before
