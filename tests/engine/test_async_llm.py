"""AsyncLLM: many tasks, cancellation, errors; nothing hangs, and nobody gets another's answer."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

import superllama


def run(model: Path, work: Any, **options: Any) -> Any:
    async def main() -> Any:
        async with await superllama.AsyncLLM.load(model, n_threads=1, chat_template="chatml", **options) as llm:
            return await asyncio.wait_for(work(llm), 240)

    return asyncio.run(main())


def test_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    assert public(superllama.AsyncLLM) - {"load"} == public(superllama.LLM)


def test_it_gives_what_llm_gives(tiny_model: Path) -> None:
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": 8, "cache_prompt": False}

    async def work(llm: superllama.AsyncLLM) -> list[Any]:
        tokens = await llm.tokenize("the llama")
        found = [await llm.generate("the llama", **greedy), await llm.generate(["a", "the"], **greedy)]
        chunks = [chunk async for chunk in llm.stream("the llama", **greedy)]
        chat = await llm.chat("the", choice=["yes", "no"])
        pieces = [chunk async for chunk in llm.chat_stream("the", choice=["yes"])]
        prompt = await llm.apply_chat_template("the")
        return [
            tokens,
            found,
            chunks,
            chat.parsed,
            "".join(p.text for p in pieces),
            prompt,
            await llm.detokenize(tokens),
        ]

    tokens, found, chunks, chat, pieces, prompt, text = run(tiny_model, work, n_parallel=1)
    with superllama.LLM(tiny_model, n_parallel=1, n_threads=1, chat_template="chatml") as llm:
        assert tokens == llm.tokenize("the llama") and text == llm.detokenize(tokens)
        assert found[0].tokens == llm.generate("the llama", **greedy).tokens
        assert [c.tokens for c in found[1]] == [c.tokens for c in llm.generate(["a", "the"], **greedy)]
        assert prompt == llm.apply_chat_template("the")
    assert "".join(chunk.text for chunk in chunks) == found[0].text
    assert chat in ("yes", "no") and pieces == "yes"


def test_a_hundred_requests_some_of_which_are_cancelled(tiny_model: Path) -> None:
    """Under the least budget that a plan names."""
    least = superllama.plan(tiny_model, n_ctx=4096, n_threads=1, use="llm", n_parallel=4).mem_least_bytes
    rng = random.Random(7)
    words = [f"{chr(97 + i % 26)}{i:03d}" for i in range(100)]
    plans = {word: rng.choice(["whole", "stream", "cancel", "leave"]) for word in words}

    async def one(llm: superllama.AsyncLLM, word: str) -> str | None:
        if plans[word] == "whole":
            return (await llm.generate("the " * rng.randrange(1, 40), choice=[word])).text
        if plans[word] == "stream":
            return "".join([chunk.text async for chunk in llm.stream("the", choice=[word])])
        if plans[word] == "leave":
            async for _ in llm.stream("the", max_tokens=500, ignore_eos=True):
                break
            return None
        task = asyncio.ensure_future(llm.generate("a " * 50, max_tokens=500, ignore_eos=True))
        await asyncio.sleep(rng.random() * 0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return None

    async def work(llm: superllama.AsyncLLM) -> list[str | None]:
        found = await asyncio.gather(*(one(llm, word) for word in words))
        slots = await asyncio.to_thread(llm._engine.ask, "GET", "/slots")
        deadline = asyncio.get_running_loop().time() + 60
        while any(slot["is_processing"] for slot in slots) and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.1)
            slots = await asyncio.to_thread(llm._engine.ask, "GET", "/slots")
        assert not any(slot["is_processing"] for slot in slots)
        assert sum(llm.memory().values()) <= least
        return found

    found = run(tiny_model, work, n_ctx=4096, mem_budget=least, n_parallel=4)
    assert found == [word if plans[word] in ("whole", "stream") else None for word in words]


def test_errors_reach_the_task(tiny_model: Path) -> None:
    async def work(llm: superllama.AsyncLLM) -> None:
        with pytest.raises(superllama.GrammarError):
            await llm.generate("the", grammar="root ::= (")
        with pytest.raises(superllama.GrammarError):
            async for _ in llm.stream("the", grammar="root ::= ("):
                pass
        with pytest.raises(TypeError, match="did you mean"):
            await llm.generate("the", temprature=1)  # type: ignore[call-overload]
        assert (await llm.generate("the", max_tokens=1)).usage.generated_tokens == 1

    run(tiny_model, work)
