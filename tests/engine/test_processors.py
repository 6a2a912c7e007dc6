"""logits_processor: functions that change the scores of tokens before one is chosen."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processors import Ids, MineError, Scores, forced
from serving import http_server

import superllama
from superllama.compat import Llama, LogitsProcessorList

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}


def moved(ids: Ids, scores: Scores) -> Scores:
    return np.roll(scores, 1)


def test_what_a_function_gets(llm: superllama.LLM) -> None:
    seen: list[tuple[Ids, Scores]] = []

    def look(ids: Ids, scores: Scores) -> Scores:
        seen.append((ids, scores))
        return scores

    prompt = llm.tokenize("the one")
    plain = llm.generate("the one", **GREEDY)
    found = llm.generate("the one", logits_processor=look, **GREEDY)
    assert found.tokens == plain.tokens  # nothing was changed
    assert len(seen) == 8
    for i, (ids, scores) in enumerate(seen):
        assert ids.dtype == np.int32 and scores.dtype == np.float32
        assert ids.tolist() == [*prompt, *plain.tokens[:i]]
        assert scores.shape == (llm.facts.n_vocab,)


def test_ban_and_force(llm: superllama.LLM) -> None:
    plain = llm.generate("the one", **GREEDY)

    def ban(ids: Ids, scores: Scores) -> Scores:
        scores[list(set(plain.tokens))] = -np.inf
        return scores

    assert not set(llm.generate("the one", logits_processor=ban, **GREEDY).tokens) & set(plain.tokens)
    assert set(llm.generate("the one", logits_processor=forced(290), **GREEDY).tokens) == {290}
    # one after the other, and chosen at random too
    both = [forced(290), moved]
    found = llm.generate("the one", logits_processor=both, temperature=2.0, max_tokens=5, ignore_eos=True)
    assert set(found.tokens) == {291}
    assert llm.generate("the one", **GREEDY).tokens == plain.tokens


def test_log_probabilities_are_of_what_it_returns(llm: superllama.LLM) -> None:
    found = llm.generate("the", logits_processor=forced(290), logprobs=1, **GREEDY)
    assert found.logprobs is not None
    assert [(entry.token, round(entry.logprob, 6)) for entry in found.logprobs] == [(290, 0.0)] * 8


def test_streams_and_conversations(llm: superllama.LLM) -> None:
    chunks = list(llm.stream("the", logits_processor=forced(290), **GREEDY))
    assert {token for chunk in chunks for token in chunk.tokens} == {290}
    text = llm.detokenize([290]).strip()
    said = llm.chat("the", logits_processor=[forced(290)], **GREEDY)
    assert said.text.replace(" ", "") == text * 8
    streamed = "".join(chunk.text for chunk in llm.chat_stream("the", logits_processor=forced(290), **GREEDY))
    assert streamed.replace(" ", "") == text * 8


def test_what_it_raises_ends_its_request_and_no_other(wide_llm: superllama.LLM) -> None:
    def fails(ids: Ids, scores: Scores) -> Scores:
        if len(ids) > 5:
            raise MineError("at", len(ids))
        return scores

    runs = threading.Event()
    found: list[superllama.Completion] = []
    n_others: list[int] = []

    def other() -> None:
        request = {"max_tokens": 200, "temperature": 0, "ignore_eos": True}
        for chunk in wide_llm.stream("a", **request):
            n_others.extend(chunk.tokens)
            runs.set()
        found.append(wide_llm.generate("a", logits_processor=forced(289), **GREEDY))

    thread = threading.Thread(target=other)
    thread.start()
    runs.wait()
    for ask in (wide_llm.generate, wide_llm.chat):
        with pytest.raises(MineError) as e:
            ask("the one of", logits_processor=fails, **GREEDY)
        assert e.value.args[0] == "at"
    with pytest.raises(MineError):
        list(wide_llm.stream("the one of", logits_processor=fails, **GREEDY))
    thread.join()
    assert len(n_others) == 200
    assert set(found[0].tokens) == {289}


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (lambda ids, scores: None, "returned nothing"),
        (lambda ids, scores: scores[:5], r"shape \(5,\)"),
        (lambda ids, scores: scores * np.nan, "no numbers"),
        (lambda ids, scores: np.full_like(scores, -np.inf), "bans every token"),
        ("no function", "is a function"),
        ([print, 3], "is a function"),
    ],
)
def test_what_is_no_scores(llm: superllama.LLM, function: Any, why: str) -> None:
    with pytest.raises(superllama.RequestError, match=why):
        llm.generate("the", logits_processor=function, **GREEDY)
    assert len(llm.generate("the", **GREEDY).tokens) == 8


def test_several_at_once(wide_llm: superllama.LLM) -> None:
    calls: dict[int, int] = {}

    def count(ids: Ids, scores: Scores) -> Scores:
        calls[len(ids)] = calls.get(len(ids), 0) + 1
        return forced(290 if ids[1] % 2 else 291)(ids, scores)  # type: ignore[no-any-return]

    prompts = [[1, 270 + i] for i in range(6)]
    found = wide_llm.generate(prompts, logits_processor=count, **GREEDY)
    assert [set(one.tokens) for one in found] == [{291}, {290}] * 3
    assert calls == dict.fromkeys(range(2, 10), 6)
    several = wide_llm.generate([1, 271], n=3, logits_processor=count, **GREEDY)
    assert [set(one.tokens) for one in (several, *several.alternatives)] == [{290}] * 3


def test_leaving_a_stream_ends_the_calls(llm: superllama.LLM) -> None:
    calls: list[int] = []

    def count(ids: Ids, scores: Scores) -> Scores:
        calls.append(len(ids))
        return scores

    stream = llm.stream("the", logits_processor=count, temperature=0, max_tokens=900, ignore_eos=True)
    while not next(stream).tokens:
        pass
    stream.close()  # type: ignore[attr-defined] # a generator
    n = len(calls)  # freed: nobody calls it any more
    assert len(llm.generate("a", **GREEDY).tokens) == 8
    assert len(calls) == n < 900


def test_it_may_not_wait_for_its_own_engine(llm: superllama.LLM) -> None:
    said: list[str] = []

    def asks(ids: Ids, scores: Scores) -> Scores:
        said.append(llm.detokenize(ids.tolist()))  # which needs no slot
        llm.generate("a")
        return scores

    with pytest.raises(superllama.RequestError, match="wait for it"):
        llm.generate("the one", logits_processor=asks, **GREEDY)
    assert len(said) == 1 and "the" in said[0]


def test_closing_the_engine_in_the_middle(tiny_model: Path) -> None:
    engine = superllama.LLM(tiny_model, n_ctx=512, n_parallel=1, n_threads=1)

    def closes(ids: Ids, scores: Scores) -> Scores:
        engine.close()
        return scores

    with contextlib.suppress(superllama.Error):  # unless the answer ends before the engine hears it
        engine.generate("the", logits_processor=closes, max_tokens=400, temperature=0, ignore_eos=True)
    assert engine.closed
    with pytest.raises(superllama.ModelError, match="closed"):
        engine.generate("the")


def test_asyncio(tiny_model: Path) -> None:
    def fails(ids: Ids, scores: Scores) -> Scores:
        raise MineError

    async def main() -> None:
        async with await superllama.AsyncLLM.load(tiny_model, n_ctx=1024, n_threads=1) as llm:
            one, other = await asyncio.gather(
                llm.generate("the", logits_processor=forced(290), **GREEDY),
                llm.generate("one", logits_processor=forced(291), **GREEDY),
            )
            assert set(one.tokens) == {290} and set(other.tokens) == {291}
            with pytest.raises(MineError):
                await llm.generate("the", logits_processor=fails, **GREEDY)
            with pytest.raises(MineError):
                async for _ in llm.stream("the", logits_processor=fails, **GREEDY):
                    pass
            found = [chunk async for chunk in llm.stream("the", logits_processor=forced(292), **GREEDY)]
            assert {token for chunk in found for token in chunk.tokens} == {292}

    asyncio.run(main())


@pytest.fixture(scope="module")
def llama(tiny_model: Path) -> Iterator[Llama]:
    made = Llama(str(tiny_model), n_ctx=256, n_threads=1, chat_format="chatml", verbose=False)
    yield made
    made.close()


def test_as_llama_cpp_python_has_it(llama: Llama) -> None:
    text = llama.detokenize([290]).decode().strip()
    several = LogitsProcessorList([forced(289), moved])
    found = llama("the", max_tokens=3, logits_processor=several)
    assert found["choices"][0]["text"].replace(" ", "") == text * 3
    assert np.argmax(several(np.zeros(1, np.int32), np.zeros(303, np.float32))) == 290
    said = llama.create_chat_completion([{"role": "user", "content": "a"}], max_tokens=3, logits_processor=several)
    assert said["choices"][0]["message"]["content"].replace(" ", "") == text * 3
    parts = llama("the", max_tokens=3, logits_processor=several, stream=True)
    assert "".join(part["choices"][0]["text"] for part in parts).replace(" ", "") == text * 3


def test_with_speculation_it_is_refused(tiny_model: Path) -> None:
    with superllama.LLM(tiny_model, n_ctx=512, n_threads=1, speculative=str(tiny_model)) as llm:
        with pytest.raises(superllama.RequestError, match="speculation"):
            llm.generate("the", logits_processor=forced(290), **GREEDY)
        assert len(llm.generate("the", **GREEDY).tokens) == 8


def test_over_http_there_is_none(tiny_model: Path, tmp_path: Path) -> None:
    with http_server(tiny_model, tmp_path / "log", "-np", 1, "-c", 256) as server:
        why = server.refused("/completion", {"prompt": "a", "logits_processor": ["ban_blue"]})
        assert "logits_processor is a function" in why
        body = {"messages": [{"role": "user", "content": "a"}], "logits_processor": "f"}
        assert "logits_processor is a function" in server.refused("/v1/chat/completions", body)
