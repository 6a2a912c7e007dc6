"""Threads, cancellation and memory: contexts side by side, one misused, stopped, and freed."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from running import Runner

import superllama
from superllama import Context, Model

GREEDY = {"temperature": 0, "ignore_eos": True}


def in_thread(function: Any) -> Any:
    """What the function returns or raises in another thread."""
    result: list[Any] = []

    def run() -> None:
        try:
            result.append(function())
        except BaseException as e:
            result.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return result[0]


# ---------------------------------------------------------------- several threads


def test_two_contexts_in_two_threads(model: Model) -> None:
    def generate(prompt: str) -> list[int | None]:
        with Context(model, n_ctx=512, n_threads=1) as ctx:
            return [p.token for _ in range(3) for p in ctx.generate(prompt, max_tokens=60, **GREEDY)]

    prompts = ["the one", "of and to"]
    alone = [generate(prompt) for prompt in prompts]
    together: dict[str, list[int | None]] = {}
    threads = [threading.Thread(target=lambda p=p: together.update({p: generate(p)})) for p in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [together[prompt] for prompt in prompts] == alone


def test_a_generator_may_move_to_another_thread(ctx: Context) -> None:
    expected = [p.token for p in ctx.generate("the one", max_tokens=4, **GREEDY)]
    running = ctx.generate("the one", max_tokens=4, **GREEDY)
    tokens = [next(running).token, in_thread(lambda: next(running)).token, next(running).token]
    assert [*tokens, in_thread(lambda: next(running)).token] == expected
    running.close()


def test_generators_of_one_context_go_on_in_whatever_thread_asks(model: Model) -> None:
    """As in a pool of threads, each piece in one that is free: two sequences, never at the same time."""
    prompts = ["the one", "of and to"]
    with Context(model, n_ctx=512, n_seq_max=2) as ctx:
        alone = [[p.token for p in ctx.generate(q, seq=i, max_tokens=6, **GREEDY)] for i, q in enumerate(prompts)]
        running = [ctx.generate(q, seq=i, max_tokens=6, **GREEDY) for i, q in enumerate(prompts)]
        together = [[in_thread(lambda r=r: next(r)).token for r in running] for _ in range(6)]
        assert [list(tokens) for tokens in zip(*together, strict=True)] == alone


def test_other_threads_may_use_a_context_between_two_pieces(ctx: Context) -> None:
    expected = [p.token for p in ctx.generate("the one", max_tokens=10, **GREEDY)]
    running = ctx.generate("the one", max_tokens=10, **GREEDY)
    tokens = [next(running).token]
    assert in_thread(ctx.seq_pos_max) > 0
    assert isinstance(in_thread(ctx.state_save), bytes)
    assert in_thread(ctx.metrics).token > 0
    tokens += [p.token for p in running]
    assert tokens == expected
    # one that changes the generator's sequence is found by its next piece
    running = ctx.generate("the one", max_tokens=10, **GREEDY)
    next(running)
    in_thread(ctx.clear)
    with pytest.raises(superllama.DecodeError, match="was changed"):
        next(running)


def test_an_abandoned_generator_locks_nobody_out(ctx: Context) -> None:
    abandoned = ctx.generate("the one", **GREEDY)
    next(abandoned)
    never_begun = ctx.generate("the one", **GREEDY)
    assert len(in_thread(lambda: list(ctx.generate("of", max_tokens=3, **GREEDY)))) == 3
    assert in_thread(ctx.close) is None
    del abandoned, never_begun


def test_a_call_at_the_same_time_raises(model: Model) -> None:
    """Two threads decode as fast as they can; each call works or raises ConcurrentUseError, and nothing crashes."""
    with Context(model, n_ctx=512) as ctx:
        tokens = model.tokenize("the one of and to in is")
        outcomes: list[object] = []

        def hammer() -> None:
            for _ in range(200):
                try:
                    ctx.clear()
                    ctx.decode(tokens)
                    outcomes.append("done")
                except superllama.ConcurrentUseError as e:
                    outcomes.append(e)
                except superllama.PromptTooLongError:
                    outcomes.append("full")  # the other thread's tokens came in between

        threads = [threading.Thread(target=hammer) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(outcomes) == 800
        assert "done" in outcomes
        assert any(isinstance(o, superllama.ConcurrentUseError) for o in outcomes)
        ctx.clear()
        ctx.decode(tokens)


# ---------------------------------------------------------------- stopping


def test_cancel_ends_a_generation(ctx: Context) -> None:
    whole = [p.token for p in ctx.generate("the one", max_tokens=12, **GREEDY)]
    running = ctx.generate("the one", max_tokens=12, **GREEDY)
    tokens = [next(running).token for _ in range(3)]
    in_thread(ctx.cancel)
    (last,) = running
    assert (last.token, last.finish_reason) == (None, "cancelled")
    assert last.summary is not None
    assert last.summary.generated_tokens == 3
    tokens += [p.token for p in ctx.generate("", keep=True, max_tokens=9, **GREEDY)]
    assert tokens == whole


def test_cancel_reaches_into_a_prompt(demo: Model) -> None:
    """The prompt takes seconds; cancelling it from another thread raises, and what it added is removed."""
    with Context(demo, n_ctx=4096, n_threads=1) as ctx:
        tokens = demo.tokenize("word " * 3500)
        timer = threading.Timer(0.3, ctx.cancel)
        timer.start()
        with pytest.raises(superllama.CancelledError):
            while True:  # the machine may be fast
                ctx.clear()
                ctx.decode(tokens)
        assert ctx.seq_pos_max() == -1
        ctx.decode(tokens[:5])  # a new call is not cancelled
        timer.join()


def test_cancel_without_work_changes_nothing(ctx: Context) -> None:
    ctx.cancel()
    assert len(list(ctx.generate("the", max_tokens=3, **GREEDY))) == 3


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_stops_between_tokens(tiny_model: Path, run_python: Runner) -> None:
    script = """
import os, signal, sys, superllama
ctx = superllama.Context(sys.argv[1])
tokens = []
try:
    for piece in ctx.generate("the", temperature=0, ignore_eos=True):
        tokens.append(piece.token)
        if len(tokens) == 3:
            os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print(len(tokens) < 20, len(list(ctx.generate("", keep=True, max_tokens=4, ignore_eos=True))))
"""
    done = run_python(script, tiny_model)
    assert (done.returncode, done.stdout) == (0, "True 4\n"), done.stderr


def test_progress_of_a_load(tiny_model: Path) -> None:
    seen: list[float] = []
    Model(tiny_model, progress=seen.append).close()
    assert seen == sorted(seen)
    assert seen[-1] == 1.0
    with pytest.raises(superllama.CancelledError, match="progress"):
        Model(tiny_model, progress=lambda _: False)

    def fail(_: float) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        Model(tiny_model, progress=fail)


# ---------------------------------------------------------------- freeing


def test_closing(tiny_model: Path) -> None:
    model = Model(tiny_model)
    ctx = Context(model)
    model.close()
    model.close()
    assert ctx.closed
    ctx.close()
    for use in (ctx.logits, ctx.metrics, ctx.clear, lambda: ctx.generate("x")):
        with pytest.raises(superllama.Error, match="closed"):
            use()
    for use in (lambda: model.tokenize("x"), lambda: Context(model), lambda: model.n_embd):
        with pytest.raises(superllama.Error, match="closed"):
            use()


def test_a_model_in_use_is_not_closed(model: Model) -> None:
    ctx = Context(model)
    with ctx._use(), pytest.raises(superllama.ConcurrentUseError):
        model.close()
    assert not model.closed
    assert not ctx.closed


def test_a_path_belongs_to_its_context(tiny_model: Path, model: Model) -> None:
    with Context(tiny_model) as ctx:
        owned = ctx.model
    assert owned.closed
    Context(model).close()
    assert not model.closed


def test_memory_returns_to_its_level(tiny_model: Path, demo_model: Path, run_python: Runner) -> None:
    script = """
import gc, sys
import psutil, superllama

def cycle(path, close):
    ctx = superllama.Context(path, n_ctx=2048)
    list(ctx.generate("the one", max_tokens=3, seed=1))
    if close:
        ctx.close()

def growth(path, n):
    for i in range(4):
        cycle(path, i % 2)
    gc.collect()
    before = psutil.Process().memory_info().rss
    for i in range(n):
        cycle(path, i % 2)
    gc.collect()
    return psutil.Process().memory_info().rss - before

print(growth(sys.argv[1], 20), growth(sys.argv[2], 6))
"""
    done = run_python(script, tiny_model, demo_model)
    assert done.returncode == 0, done.stderr
    tiny_growth, demo_growth = map(int, done.stdout.split())
    assert tiny_growth < 8e6  # one leaked context alone is 1 MB of KV cache
    assert demo_growth < 60e6  # one leaked model is 100 MB


def test_the_end_of_the_interpreter_is_quiet(tiny_model: Path, run_python: Runner) -> None:
    script = """
import logging, sys, superllama
logging.basicConfig(level=logging.CRITICAL)
model = superllama.Model(sys.argv[1])
keep = [superllama.Context(model), superllama.Context(sys.argv[1])]
generator = keep[0].generate("the", ignore_eos=True)
next(generator)
"""
    done = run_python(script, tiny_model)
    assert (done.returncode, done.stderr) == (0, "")
