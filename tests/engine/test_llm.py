"""LLM: texts, conversations, forms, vectors; the same as the other ways to the model."""

from __future__ import annotations

import json
import math
import threading
import warnings
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny_model as tiny
from pydantic import BaseModel, Field
from serving import http_server

import superllama

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "cache_prompt": False}
LETTERS = "root ::= [a-z ]+"
LETTERED = GREEDY | {"grammar": LETTERS}  # whole characters only


def test_one_prompt_or_several(llm: superllama.LLM) -> None:
    one = llm.generate("the llama", max_tokens=8, **GREEDY)
    assert one.usage.prompt_tokens == len(llm.tokenize("the llama"))
    assert one.usage.generated_tokens == len(one.tokens) == 8
    assert one.finish_reason == "length" and one.stop_reason is None
    assert one.text == llm.detokenize(one.tokens)
    prompts = ["the llama", "a", "it is for you", "and he was on", "that", "with you", "in it"]
    several = llm.generate(prompts, max_tokens=8, **GREEDY)
    assert [c.tokens for c in several] == [llm.generate(p, max_tokens=8, **GREEDY).tokens for p in prompts]
    assert llm.generate(llm.tokenize("the llama"), max_tokens=8, **GREEDY).tokens == one.tokens
    tokens = [llm.tokenize(prompt) for prompt in prompts[:2]]
    assert [c.tokens for c in llm.generate(tokens, max_tokens=8, **GREEDY)] == [c.tokens for c in several[:2]]
    assert llm.generate([]) == []


def test_what_context_gives(tiny_model: Path, llm: superllama.LLM) -> None:
    with superllama.Context(tiny_model, n_ctx=256, n_threads=1) as ctx:
        found = ctx.generate("he was on it", max_tokens=12, temperature=0, ignore_eos=True)
        tokens = [piece.token for piece in found]
    assert list(llm.generate("he was on it", max_tokens=12, **GREEDY).tokens) == [t for t in tokens if t is not None]


def test_stream_is_what_generate_gives(llm: superllama.LLM) -> None:
    whole = llm.generate(["the", "a b c"], max_tokens=10, **GREEDY)
    for k, text in enumerate(whole):
        chunks = [c for c in llm.stream(["the", "a b c"], max_tokens=10, **GREEDY) if c.index == k]
        assert "".join(c.text for c in chunks) == text.text
        assert tuple(t for c in chunks for t in c.tokens) == text.tokens
        assert [c.finish_reason for c in chunks if c.finish_reason] == ["length"]
        assert chunks[-1].usage is not None and chunks[-1].usage.generated_tokens == 10
        assert chunks[0].progress is not None


def test_the_same_prompt_again_is_not_computed(llm: superllama.LLM) -> None:
    prompt = "and it is " * 40
    first = llm.generate(prompt, max_tokens=2, temperature=0)
    again = llm.generate(prompt, max_tokens=2, temperature=0)
    longer = llm.generate(prompt + "for you", max_tokens=2, temperature=0)
    n = first.usage.prompt_tokens
    assert again.usage.prompt_tokens == n and again.usage.cached_tokens == n - 1
    assert longer.usage.cached_tokens >= n - 2
    fresh = llm.generate(prompt + "for you", max_tokens=2, cache_prompt=False, temperature=0)
    assert fresh.usage.cached_tokens == 0 and fresh.usage.prompt_tokens == longer.usage.prompt_tokens


def test_a_slot_goes_to_a_file_and_back(tiny_model: Path, tmp_path: Path) -> None:
    prompt = "and it is " * 40
    for k in range(2):  # the second engine is a new one
        with superllama.LLM(tiny_model, n_threads=1, n_parallel=1, n_ctx=512, slot_save_path=tmp_path) as llm:
            if k == 0:
                n = llm.generate(prompt, max_tokens=2, slot=0).usage.prompt_tokens
                assert llm.save_slot("session") >= n
                assert llm.erase_slot() >= n
                assert llm.generate(prompt, max_tokens=1).usage.cached_tokens == 0
            else:
                assert llm.restore_slot("session") >= n
                assert llm.generate(prompt, max_tokens=1).usage.cached_tokens >= n - 2
            with pytest.raises(superllama.Error):
                llm.restore_slot("nothing")
            with pytest.raises(superllama.Error):
                llm.save_slot("../outside")


def test_alternatives(wide_llm: superllama.LLM) -> None:
    found = wide_llm.generate("the", n=3, max_tokens=6, seed=1, temperature=5.0, top_k=0, top_p=1.0, min_p=0.0)
    texts = [found.tokens, *(other.tokens for other in found.alternatives)]
    assert len(found.alternatives) == 2 and len(set(texts)) == 3
    several = wide_llm.generate(["the", "a"], n=2, max_tokens=4, seed=1)
    assert [len(c.alternatives) for c in several] == [1, 1]
    for wrong in (0, 5, 2.5):
        with pytest.raises(superllama.RequestError, match=f"n={wrong}: 1 to n_parallel, which is 4"):
            wide_llm.generate("the", n=wrong)  # type: ignore[call-overload]
    with pytest.raises(superllama.RequestError, match="slot=4: there are 0 to 3"):
        next(wide_llm.chat_stream("the", slot=4))


def test_logprobs(llm: superllama.LLM) -> None:
    found = llm.generate("the", max_tokens=3, logprobs=4, **GREEDY)
    assert found.logprobs is not None
    assert [entry.token for entry in found.logprobs] == list(found.tokens)
    streamed = list(llm.stream("the", max_tokens=12, logprobs=4, **GREEDY))
    whole = llm.generate("the", max_tokens=12, logprobs=4, **GREEDY)  # with parts of characters
    assert [entry for c in streamed for entry in c.logprobs or ()] == list(whole.logprobs or ())
    assert [entry.token for entry in whole.logprobs or ()] == list(whole.tokens)
    for entry in found.logprobs:
        assert len(entry.top) == 4 and entry.top[0].token == entry.token and entry.logprob <= 0
        assert entry.top[0].logprob == max(t.logprob for t in entry.top)
    assert llm.generate("the", max_tokens=3, **GREEDY).logprobs is None


def test_the_end_of_a_text(llm: superllama.LLM) -> None:
    whole = llm.generate("the", max_tokens=20, grammar=LETTERS, **GREEDY).text
    stop = whole[4:6]
    ended = llm.generate("the", max_tokens=20, grammar=LETTERS, stop=stop, **GREEDY)
    assert ended.finish_reason == "stop" and ended.stop_reason == stop
    assert ended.text == whole[: whole.index(stop)]
    assert llm.generate("the", max_tokens=0).tokens == ()


def test_logit_bias(llm: superllama.LLM) -> None:
    first = llm.generate("the", max_tokens=1, **GREEDY).tokens[0]
    banned = llm.generate("the", max_tokens=1, temperature=0, logit_bias={first: -math.inf}).tokens[0]
    forced = llm.generate("the", max_tokens=3, temperature=0, logit_bias={300: 1000.0}).tokens
    assert banned != first and forced == (300,) * 3


def test_names_are_checked(llm: superllama.LLM, tiny_model: Path) -> None:
    assert llm.generate("the", max_new_tokens=2, temp=0).usage.generated_tokens <= 2  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="did you mean temperature"):
        llm.generate("the", temprature=0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="max_tokens and n_predict are the same"):
        llm.generate("the", max_tokens=2, n_predict=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="did you mean n_parallel"):
        superllama.LLM(tiny_model, n_paralel=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="no parameter 'help'"):
        superllama.LLM(tiny_model, help=True)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="switch"):
        superllama.LLM(tiny_model, paged_kv=3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="did you mean cache_reuse"):
        superllama.LLM(tiny_model, flags={"cache_reus": 3})
    with superllama.LLM(tiny_model, n_threads=1, flags={"cache_reuse": 16, "warmup": False}) as other:
        assert other.generate("the", max_tokens=1).usage.generated_tokens == 1


@pytest.mark.parametrize(
    ("wrong", "kind"),
    [
        ({"temperature": "hot"}, superllama.RequestError),
        ({"temperature": math.nan}, superllama.RequestError),
        ({"max_tokens": -5}, superllama.RequestError),
        ({"grammar": "root ::= ("}, superllama.GrammarError),
        ({"response_format": {"type": "string", "pattern": "^(?=a)"}}, superllama.GrammarError),
        ({"samplers": ["nonsense"]}, TypeError),
    ],
)
def test_wrong_requests_are_errors(llm: superllama.LLM, wrong: dict[str, Any], kind: type[Exception]) -> None:
    with pytest.raises(kind):
        llm.generate("the", **wrong)
    assert llm.generate("the", max_tokens=1).usage.generated_tokens == 1


@pytest.mark.parametrize("wrong", ["", b"bytes", None, 3, "\ud800", ["a", 3], [[1, "x"]], [True]])
def test_wrong_prompts_are_errors(llm: superllama.LLM, wrong: Any) -> None:
    with pytest.raises(superllama.PromptError):
        llm.generate(wrong)


def test_a_prompt_that_is_too_long_says_so(llm: superllama.LLM) -> None:
    with pytest.raises(superllama.PromptTooLongError) as e:
        llm.generate("q" * 2000)
    assert e.value.n_tokens > 2000 > e.value.n_room


# ---------------------------------------------------------------- forms


class Animal(BaseModel):  # at its longest in less than 400 tokens, so that no answer is cut, whatever the model says
    kind: str = Field(max_length=8)
    legs: int = Field(ge=0, le=8)


def test_forms_are_held(llm: superllama.LLM) -> None:
    assert llm.generate("the", choice=["yes", "no"], temperature=0).parsed in ("yes", "no")
    found = llm.generate("the", regex=r"[0-9]{2}-[a-c]+x", temperature=1.0, seed=3, max_tokens=200)
    assert found.parsed == found.text and found.text.endswith("x") and found.text[2] == "-"
    number = llm.generate("the", response_format={"type": "integer", "minimum": 3, "maximum": 5}, seed=1)
    assert number.parsed in (3, 4, 5)
    animals = llm.generate(["a", "the"], response_format=Animal, max_tokens=400, logit_bias={'"': 5.0}, seed=4)
    assert all(isinstance(a.parsed, Animal) for a in animals)
    assert llm.generate("the", grammar='root ::= "ab"').text == "ab"


WAYS = """root ::= a b? c{0,3}
a ::= [abc] | a-1
a-1 ::= "x"
b ::= root a a
c ::= b | ""
"""


def test_a_grammar_that_goes_on_in_too_many_ways_ends(llm: superllama.LLM, tiny_model: Path) -> None:
    """Each character multiplies the ways to read it."""
    with pytest.raises(superllama.GrammarError, match="ways at once"):
        llm.generate("the", grammar=WAYS, max_tokens=200, ignore_eos=True)
    assert llm.generate("the", max_tokens=1).usage.generated_tokens == 1
    with superllama.Context(tiny_model, n_ctx=256) as ctx:
        with pytest.raises(superllama.GrammarError, match="ways at once"):
            list(ctx.generate("the", grammar=WAYS, max_tokens=200, ignore_eos=True))
        assert list(ctx.generate("the", max_tokens=1))


def test_an_answer_that_is_cut_is_an_error(llm: superllama.LLM) -> None:
    forms: list[dict[str, Any]] = [
        {"response_format": Animal},
        {"regex": "[0-9]{20}"},
        {"choice": ["abcdefghijklm", "nopqrstuvwxyz"]},
    ]
    for form in forms:
        for ask in (llm.generate, llm.chat):
            with pytest.raises(superllama.GrammarError, match="max_tokens"):
                ask("the", max_tokens=3, **form)
    assert llm.generate("the", regex="[0-9]{3,}", max_tokens=3).parsed.isdigit()  # cut, and whole
    cut = llm.generate("the", grammar="root ::= [0-9]{20}", max_tokens=3)
    assert cut.parsed is None and cut.finish_reason == "length"


# ---------------------------------------------------------------- conversations


def test_chat_is_the_prompt_of_its_template(llm: superllama.LLM) -> None:
    messages = [{"role": "user", "content": "the"}]
    prompt = llm.apply_chat_template(messages)
    assert prompt == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\n"
    answer = llm.chat(messages, max_tokens=6, **LETTERED)
    assert answer.text == llm.generate(prompt, max_tokens=6, **LETTERED).text
    assert answer.message["role"] == "assistant" and answer.message["content"] == answer.text
    assert answer.finish_reason == "length" and answer.usage.generated_tokens == 6
    assert llm.chat("the", max_tokens=6, **LETTERED).text == answer.text


def test_chat_in_pieces(llm: superllama.LLM) -> None:
    whole = llm.chat("the", max_tokens=9, **LETTERED)
    chunks = list(llm.chat_stream("the", max_tokens=9, **LETTERED))
    assert "".join(c.text for c in chunks) == whole.text
    assert chunks[-1].finish_reason == "length"
    assert chunks[-1].usage is not None and chunks[-1].usage.generated_tokens == 9


def test_chat_has_forms(llm: superllama.LLM, demo_llm: superllama.LLM) -> None:
    assert llm.chat("the", choice=["yes", "no"]).parsed in ("yes", "no")
    animal = llm.chat("the", response_format=Animal, max_tokens=400, logit_bias={'"': 5.0}, seed=4).parsed
    assert isinstance(animal, Animal)
    with pytest.raises(superllama.GrammarError, match="tools"):
        demo_llm.chat("the", choice=["yes"], tools=[get_weather])


@pytest.mark.parametrize("wrong", [None, 3, ["a"], [{"role": "user", "content": 3}], []])
def test_wrong_messages_are_errors(llm: superllama.LLM, wrong: Any) -> None:
    with pytest.raises((superllama.PromptError, superllama.RequestError)):
        llm.chat(wrong)


def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"sunny in {city}"


def asked_before(city: str) -> list[Any]:
    """A question to a small model, which has to see what an answer looks like."""
    messages: list[Any] = []
    for i, other in enumerate(("Rome", "Lima")):
        call = {"name": "get_weather", "arguments": json.dumps({"city": other})}
        messages += [
            {"role": "user", "content": f"Weather in {other}?"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": f"c{i}", "type": "function", "function": call}],
            },
            {"role": "tool", "tool_call_id": f"c{i}", "content": "rain"},
            {"role": "assistant", "content": "Rain."},
        ]
    return [*messages, {"role": "user", "content": f"Weather in {city}?"}]


def test_a_tool_is_called(demo_llm: superllama.LLM) -> None:
    messages = asked_before("Paris")
    request: dict[str, Any] = {"tools": [get_weather], "tool_choice": "required", "temperature": 0, "max_tokens": 100}
    answer = demo_llm.chat(messages, **request)
    assert answer.finish_reason == "tool_calls"
    call = answer.tool_calls[0]
    assert call.name == "get_weather" and set(call.arguments) == {"city"}
    assert call.call() == f"sunny in {call.arguments['city']}"
    *_, last = demo_llm.chat_stream(messages, **request)
    assert [(c.name, c.arguments) for c in last.tool_calls] == [(c.name, c.arguments) for c in answer.tool_calls]
    messages += [answer.message, call.result(call.call())]
    assert demo_llm.chat(messages, max_tokens=8, temperature=0).usage.generated_tokens > 0


def test_a_required_tool_that_is_not_called_is_an_error(demo_llm: superllama.LLM) -> None:
    """The model may say something first, and does until max_tokens."""
    request: dict[str, Any] = {"tools": [get_weather], "temperature": 0, "max_tokens": 20}
    assert not demo_llm.chat("Write a poem", **request).tool_calls
    with pytest.raises(superllama.GrammarError, match="no tool was called"):
        demo_llm.chat("Write a poem", **request, tool_choice="required")
    with pytest.raises(superllama.GrammarError, match="no tool was called"):
        list(demo_llm.chat_stream("Write a poem", **request, tool_choice="required"))


def test_a_tool_can_be_named(demo_llm: superllama.LLM) -> None:
    def get_time(zone: str) -> str:
        """The time in a zone."""
        return zone

    named = {"type": "function", "function": {"name": "get_time"}}
    both = [get_weather, get_time]
    answer = demo_llm.chat(asked_before("Paris"), tools=both, tool_choice=named, temperature=0, max_tokens=100)
    assert [call.name for call in answer.tool_calls] == ["get_time"]
    with pytest.raises(superllama.RequestError, match="not among the tools"):
        demo_llm.chat("Hello", tools=[get_weather], tool_choice=named)
    with pytest.raises(superllama.RequestError, match="no tools"):
        demo_llm.chat("Hello", tool_choice="required")


def test_tools_that_a_template_does_not_show_are_refused(llm: superllama.LLM) -> None:
    with pytest.raises(superllama.TemplateError, match="no tools"):
        llm.chat("the", tools=[get_weather])
    with pytest.raises(superllama.RequestError, match="no tools"):  # over HTTP too, where one is required
        tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        body = {"messages": [{"role": "user", "content": "the"}], "tools": [tool], "tool_choice": "required"}
        llm._engine.ask("POST", "/v1/chat/completions", body)


def test_a_turn_computes_what_is_new(demo_llm: superllama.LLM) -> None:
    messages: list[Any] = [{"role": "user", "content": "Tell me about llamas. " * 20}]
    first = demo_llm.chat(messages, temperature=0, max_tokens=16)
    messages += [first.message, {"role": "user", "content": "And alpacas?"}]
    second = demo_llm.chat(messages, temperature=0, max_tokens=4)
    assert second.usage.cached_tokens >= first.usage.prompt_tokens - 1
    assert second.usage.prompt_tokens - second.usage.cached_tokens < 50


# ---------------------------------------------------------------- vectors


def test_embed(tiny_bert: Path) -> None:
    with superllama.LLM(tiny_bert, embedding=True, pooling="mean", n_threads=1) as llm:
        one = llm.embed("the llama")
        assert math.isclose(sum(x * x for x in one), 1.0, rel_tol=1e-5)
        several = llm.embed(["the llama", "a", llm.tokenize("it is")])
        assert several[0] == pytest.approx(one, abs=1e-6) and len(several) == 3
        assert llm.embed([]) == []
        raw, short = llm.embed("the llama", normalize=False), llm.embed("the llama", dimensions=4)
        whole = math.sqrt(sum(x * x for x in raw))
        assert not math.isclose(whole, 1.0, rel_tol=1e-3) and [x / whole for x in raw] == pytest.approx(one, abs=1e-6)
        length = math.sqrt(sum(x * x for x in raw[:4]))
        assert short == pytest.approx([x / length for x in raw[:4]], abs=1e-6)
        with pytest.raises(superllama.RequestError, match="dimensions"):
            llm.embed("the", dimensions=10_000)
    with superllama.Model(tiny_bert) as model, superllama.Context(model, embeddings=True, pooling="mean") as ctx:
        assert list(ctx.embed("the llama")) == pytest.approx(one, abs=1e-5)


def test_a_text_that_is_too_long_to_embed_says_so(tiny_bert: Path) -> None:
    with superllama.LLM(tiny_bert, embedding=True, pooling="mean", n_threads=1, n_ubatch=16, n_batch=16) as llm:
        with pytest.raises(superllama.PromptTooLongError, match="n_ubatch is 16") as e:
            llm.embed(["a", "q" * 40])
        assert e.value.n_tokens > 16 == e.value.n_room
        assert llm.embed("a")


@pytest.mark.parametrize("pooling", [gguf.PoolingType.RANK, gguf.PoolingType.MEAN])
def test_scores_of_what_is_no_reranker_come_with_a_warning(tmp_path: Path, pooling: gguf.PoolingType) -> None:
    model = tiny.write_bert(tmp_path / "m.gguf", pooling=pooling)
    with superllama.LLM(model, reranking=True, n_threads=1) as llm, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert len(llm.rerank("the", ["a", "llama"])) == 2
    assert ["m.gguf does not say that it is a reranker" in str(w.message) for w in told] == (
        [] if pooling == gguf.PoolingType.RANK else [True]
    )


def test_what_a_model_does_not_offer_is_an_error(llm: superllama.LLM) -> None:
    with pytest.raises(superllama.ModelError, match=r"LLM\(\.\.\., embedding=True\)"):
        llm.embed("the")
    with pytest.raises(superllama.ModelError, match=r"LLM\(\.\.\., reranking=True\)"):
        llm.rerank("the", ["a"])
    with pytest.raises(superllama.PromptError):
        llm.rerank("the", "a")
    assert llm.rerank("the", []) == []


# ---------------------------------------------------------------- beside the server


def test_the_server_says_the_same(tiny_model: Path, llm: superllama.LLM, tmp_path: Path) -> None:
    with http_server(tiny_model, tmp_path / "log", "-c", 1024, "-np", 1, "--chat-template", "chatml") as server:
        text = server.complete("the llama", n_predict=16, ignore_eos=True)["content"]
        _, props = server.request("/props")
    assert llm.generate("the llama", max_tokens=16, **GREEDY).text == text
    ours = llm._engine.ask("GET", "/props")
    same = ("default_generation_settings", "total_slots", "chat_template", "modalities", "chat_template_caps")
    assert json.dumps({k: ours[k] for k in same}) == json.dumps({k: props[k] for k in same})


def test_threads_share_an_engine(wide_llm: superllama.LLM) -> None:
    words = [f"{letter}{letter}{letter}" for letter in "abcdefghijkl"]
    found: dict[str, str] = {}

    def ask(word: str) -> None:
        found[word] = "".join(c.text for c in wide_llm.stream("the", choice=[word]))

    threads = [threading.Thread(target=ask, args=(word,)) for word in words]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {word: word for word in words}
