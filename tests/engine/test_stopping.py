"""stopping_criteria of compat.Llama: functions that end a text before its next token."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processors import Ids, MineError, Scores, forced

import superllama
from superllama.compat import Llama, LlamaGrammar, LogitsProcessorList, StoppingCriteriaList


@pytest.fixture(scope="module")
def llama(tiny_model: Path) -> Iterator[Llama]:
    with Llama(str(tiny_model), n_ctx=256, n_threads=1, verbose=False) as made:
        yield made


@pytest.fixture(scope="module")
def request_of(llama: Llama) -> dict[str, Any]:
    """Greedy, and never at an end by itself."""

    def goes_on(tokens: Ids, scores: Scores) -> Scores:
        scores[llama.token_eos()] = -np.inf
        return scores

    return {"prompt": "the one of", "temperature": 0.0, "logits_processor": LogitsProcessorList([goes_on])}


def texts(llama: Llama, **request: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The answer, and the same one in parts; both say the same."""
    whole = llama(**request)["choices"][0]
    parts = [part["choices"][0] for part in llama(**request, stream=True)]
    assert "".join(part["text"] for part in parts) == whole["text"]
    assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + [whole["finish_reason"]]
    return whole, parts


def after(n_tokens: int) -> Any:
    return lambda tokens, logits: len(tokens) >= n_tokens


def test_a_text_ends_after_the_token_that_satisfied_it(llama: Llama, request_of: dict[str, Any]) -> None:
    seen: list[tuple[Ids, Scores]] = []

    def look(tokens: Ids, logits: Scores) -> bool:
        seen.append((tokens, logits))
        return False

    full = llama(**request_of, max_tokens=8, stopping_criteria=look)
    assert full["choices"][0]["finish_reason"] == "length"
    assert full["choices"][0]["text"] == llama(**request_of, max_tokens=8)["choices"][0]["text"]
    assert len(seen) == 8
    n_prompt = full["usage"]["prompt_tokens"]
    assert [len(tokens) for tokens, _ in seen] == [n_prompt + i for i in range(8)]
    assert all(tokens.dtype == np.int32 and logits.shape == (llama.n_vocab(),) for tokens, logits in seen)
    plain = [int(np.argmax(logits)) for _, logits in seen]  # each chooses the next token
    assert seen[7][0].tolist()[n_prompt:] == plain[:7]

    for n in (0, 1, 3, 7):
        text = llama(**request_of, max_tokens=n)["choices"][0]["text"] if n else ""
        until = [lambda tokens, logits: False, after(n_prompt + n)]
        for criteria in (until, StoppingCriteriaList(until), StoppingCriteriaList([StoppingCriteriaList(until)])):
            whole, _ = texts(llama, **request_of, max_tokens=8, stopping_criteria=criteria)
            assert (whole["text"], whole["finish_reason"]) == (text, "stop")
        found = llama(**request_of, max_tokens=8, stopping_criteria=until)
        assert found["usage"] == {"prompt_tokens": n_prompt, "completion_tokens": n, "total_tokens": n_prompt + n}


def test_log_probabilities_and_the_prompt(llama: Llama, request_of: dict[str, Any]) -> None:
    n_prompt = llama(**request_of, max_tokens=1)["usage"]["prompt_tokens"]
    request = {**request_of, "max_tokens": 8, "logprobs": 1, "echo": True}
    full = llama(**request)["choices"][0]
    whole, parts = texts(llama, **request, stopping_criteria=after(n_prompt + 3))
    assert whole["text"].startswith(request["prompt"]) and full["text"].startswith(whole["text"])
    assert whole["logprobs"]["tokens"] == full["logprobs"]["tokens"][:3]
    assert [t for part in parts if part["logprobs"] for t in part["logprobs"]["tokens"]] == whole["logprobs"]["tokens"]


def test_what_could_have_been_a_stop_text_is_there(llama: Llama, request_of: dict[str, Any]) -> None:
    request = {**request_of, "max_tokens": 8, "logits_processor": [forced(290)]}
    n_prompt = llama(**request)["usage"]["prompt_tokens"]
    end = llama(**{**request, "max_tokens": 3})["choices"][0]["text"]
    whole, parts = texts(llama, **request, stop=[end[-2:] + "never"], stopping_criteria=after(n_prompt + 3))
    assert whole["text"] == end
    assert parts[-1]["text"].endswith(end[-2:])  # which was held back


def test_half_a_character_is_what_it_is_at_any_end(llama: Llama, request_of: dict[str, Any]) -> None:
    (first, *_) = llama.tokenize("é".encode(), add_bos=False)[-2:]
    assert len(llama.detokenize([first]).decode("utf-8", "ignore")) == 0

    request = {**request_of, "logits_processor": [forced(first)], "max_tokens": 1}
    cut = llama(**request)
    n_prompt = cut["usage"]["prompt_tokens"]
    whole, _ = texts(llama, **{**request, "max_tokens": 8}, stopping_criteria=after(n_prompt + 1))
    assert (whole["text"], whole["finish_reason"]) == (cut["choices"][0]["text"], "stop")


def test_in_the_middle_of_a_grammar(llama: Llama, request_of: dict[str, Any]) -> None:
    n_prompt = llama(**request_of, max_tokens=1)["usage"]["prompt_tokens"]
    grammar = LlamaGrammar.from_string('root ::= "a" "b" "c" "d" "e" "f" "g" "h" "i"')
    request = {**request_of, "grammar": grammar, "max_tokens": 9}
    full = llama(**request)["choices"][0]["text"]
    whole, _ = texts(llama, **request, stopping_criteria=after(n_prompt + 2))
    assert 0 < len(whole["text"]) < len(full) and full.startswith(whole["text"])


def test_what_is_wrong(llama: Llama, request_of: dict[str, Any]) -> None:
    def fails(tokens: Ids, logits: Scores) -> bool:
        raise MineError

    for wrong in (["no function"], 3):
        with pytest.raises(superllama.RequestError, match="stopping_criteria is a function"):
            llama(**request_of, stopping_criteria=wrong)
    with pytest.raises(MineError):
        llama(**request_of, stopping_criteria=[fails])
    with pytest.raises(MineError):
        list(llama(**request_of, stopping_criteria=[fails], stream=True))
    with pytest.raises(ValueError, match="suffix"):
        llama(**request_of, suffix="b", stopping_criteria=[fails])
    assert llama(**request_of, max_tokens=4)["usage"]["completion_tokens"] == 4
