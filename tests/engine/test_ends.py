"""min_tokens and stop_token_ids: when the model may end, and which tokens end a text beside its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import http_server

import superllama
from superllama import LLM, RequestError

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[LLM]:
    with LLM(tiny_model, n_ctx=512, n_parallel=2, n_threads=1) as made:
        yield made


@pytest.fixture(scope="module")
def eos(tiny_model: Path) -> int:
    with superllama.Model(tiny_model, vocab_only=True) as model:
        return model.token_eos


@pytest.fixture(scope="module")
def ends_at_once(llm: LLM, eos: int) -> dict[str, Any]:
    """A request whose text is empty: nothing is as likely as its end."""
    request = {**GREEDY, "logit_bias": {eos: 1000.0}}
    assert llm.generate("the one of", **request).tokens in ((), (eos,))
    return request


@pytest.mark.parametrize("n", [1, 5, 12])
def test_the_model_does_not_end_before(llm: LLM, ends_at_once: dict[str, Any], eos: int, n: int) -> None:
    found = llm.generate("the one of", **ends_at_once, min_tokens=n)
    free = llm.generate("the one of", **GREEDY, logit_bias={eos: -float("inf")})
    assert found.tokens[:n] == free.tokens[:n]
    assert eos not in found.tokens[:n]
    assert found.usage.generated_tokens in (n, n + 1)
    assert found.finish_reason == ("stop" if n < 12 else "length")


def test_others_in_the_same_batch_end_as_they_would(llm: LLM, ends_at_once: dict[str, Any]) -> None:
    prompts = ["the one of", "of the one"]
    alone = [llm.generate(p, **ends_at_once) for p in prompts]
    longer = llm.stream(prompts[0], **ends_at_once, min_tokens=12)
    n_tokens = len(next(longer).tokens)
    together = llm.generate(prompts[1], **ends_at_once)
    assert n_tokens + sum(len(chunk.tokens) for chunk in longer) == 12
    assert together.tokens == alone[1].tokens


def test_a_token_ends_the_text(llm: LLM, eos: int) -> None:
    free = {**GREEDY, "logit_bias": {eos: -float("inf")}}
    whole = llm.generate("the one of", **free)
    for end in set(whole.tokens):
        found = llm.generate("the one of", **free, stop_token_ids=[end])
        first = whole.tokens.index(end)
        assert found.tokens == whole.tokens[: first + 1]
        assert found.text == whole.text[: len(found.text)]
        assert found.finish_reason == "stop"
        parts = list(llm.stream("the one of", **free, stop_token_ids=[end]))
        assert "".join(part.text for part in parts) == found.text
        assert tuple(t for part in parts for t in part.tokens) == found.tokens
        later = llm.generate("the one of", **free, stop_token_ids=[end], min_tokens=first + 2)
        assert end not in later.tokens[: first + 2]


def test_text_that_waits_for_a_stop_is_not_lost(llm: LLM, eos: int) -> None:
    """Text that may be the beginning of a stop is held back; a token that ends the answer lets it go."""
    free = {**GREEDY, "logit_bias": {eos: -float("inf")}}
    whole = llm.generate("the one of", **free)
    end = whole.tokens[3]
    n = whole.tokens.index(end) + 1
    text = llm.detokenize(whole.tokens[:n])
    request = {**free, "stop": [text[-2:] + "never"], "stop_token_ids": [end]}
    assert "".join(chunk.text for chunk in llm.stream("the one of", **request)) == text
    assert llm.generate("the one of", **request).text == text


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 13}, "more than the 12 tokens"),
        ({"min_tokens": 2, "regex": "[ab]"}, "form of the answer"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [10**7]}, "there is no token"),
        ({"stop_token_ids": 3}, "stop_token_ids"),
    ],
)
def test_what_cannot_be_is_refused(llm: LLM, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(RequestError, match=why):
        llm.generate("the", **GREEDY, **fields)


def test_with_speculation_the_model_may_end_anywhere(tiny_model: Path) -> None:
    with LLM(tiny_model, n_ctx=512, n_threads=1, speculative="ngram") as llm:
        with pytest.raises(RequestError, match="chosen at once"):
            llm.generate("the", min_tokens=3, max_tokens=5)
        whole = llm.generate("the one of", **GREEDY)
        found = llm.generate("the one of", **GREEDY, stop_token_ids=[whole.tokens[2]])
        assert found.tokens == whole.tokens[: whole.tokens.index(whole.tokens[2]) + 1]


def test_over_http(tiny_model: Path, tmp_path: Path, eos: int) -> None:
    with http_server(tiny_model, tmp_path / "log", "-c", 512) as server:
        for path, prompt in (
            ("/completion", {"prompt": "the"}),
            ("/v1/completions", {"prompt": "the"}),
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "the"}]}),
        ):
            body = {**prompt, "temperature": 0, "max_tokens": 9, "logit_bias": [[eos, 1000]]}
            status, answer = server.request(path, {**body, "min_tokens": 4})
            n = answer["tokens_predicted"] if path == "/completion" else answer["usage"]["completion_tokens"]
            assert (status, n) in ((200, 4), (200, 5)), path
            for wrong in ({"min_tokens": "4"}, {"min_tokens": 10}, {"min_tokens": 1.5}, {"stop_token_ids": ["a"]}):
                server.refused(path, body | wrong)
        for key in (rb"\u006din_tokens", rb"min\u005ftokens", rb"min_token\u0073"):  # a key may be written with escapes
            server.refused("/completion", b'{"prompt": "the", "n_predict": 9, "' + key + b'": 10}')
        answer = server.complete("the", n_predict=9, return_tokens=True, logit_bias=[[eos, False]])
        found = server.complete(
            "the", n_predict=9, return_tokens=True, logit_bias=[[eos, False]], stop_token_ids=answer["tokens"][4:5]
        )
        assert found["tokens"] == answer["tokens"][: answer["tokens"].index(answer["tokens"][4]) + 1]
        assert found["stop_type"] == "eos"
