"""An engine's beginning and end: threads, forks, the interpreter's exit, Ctrl-C."""

from __future__ import annotations

import gc
import signal
import threading
import time
from pathlib import Path

import pytest
from running import Runner

import superllama


def test_closed_is_an_error(tiny_model: Path) -> None:
    llm = superllama.LLM(tiny_model, n_threads=1)
    assert not llm.closed
    llm.close()
    llm.close()
    assert llm.closed and "closed" in repr(llm)
    for use in (lambda: llm.generate("the"), llm.layers, llm.memory, lambda: llm.set_budget("1GiB")):
        with pytest.raises(superllama.ModelError, match="closed"):
            use()


def test_a_file_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_text("no")
    for path in (tmp_path / "no.gguf", tmp_path / "nowhere.gguf", tmp_path):
        with pytest.raises(superllama.ModelError):
            superllama.LLM(path)


def test_progress_can_stop_it(tiny_model: Path) -> None:
    seen: list[float] = []

    def step(done: float) -> bool:
        seen.append(done)
        return False

    with pytest.raises(superllama.CancelledError):
        superllama.LLM(tiny_model, progress=step)
    assert seen
    with superllama.LLM(tiny_model, progress=seen.append, n_threads=1) as llm:
        assert seen[-1] == 1.0
        llm.generate("the", max_tokens=1)


def test_closing_ends_what_runs(tiny_model: Path) -> None:
    llm = superllama.LLM(tiny_model, n_threads=1, n_ctx=512)
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            while True:
                llm.generate("the", max_tokens=400, ignore_eos=True)
        except superllama.Error as e:
            errors.append(e)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    llm.close()
    for thread in threads:
        thread.join(60)
    assert len(errors) == 6
    assert all("closed" in str(e) or "stopped" in str(e) for e in errors), errors


def test_a_stream_that_is_left_frees_its_slot(tiny_model: Path) -> None:
    with superllama.LLM(tiny_model, n_threads=1, n_parallel=1, n_ctx=512) as llm:
        for _ in range(3):
            stream = llm.stream("the", max_tokens=400, ignore_eos=True)
            next(stream)
            del stream
            gc.collect()
        never_read = llm.stream("the", max_tokens=400, ignore_eos=True)
        del never_read
        gc.collect()
        assert llm.generate("the", max_tokens=2).usage.generated_tokens <= 2


def test_a_stream_goes_from_thread_to_thread(tiny_model: Path) -> None:
    with superllama.LLM(tiny_model, n_threads=1) as llm:
        stream = llm.stream("the", choice=["abcdef"])
        texts: list[str] = []
        while len(texts) < 100:
            ended: list[bool] = []

            def step(ended: list[bool] = ended) -> None:
                try:
                    texts.append(next(stream).text)
                except StopIteration:
                    ended.append(True)

            thread = threading.Thread(target=step)
            thread.start()
            thread.join()
            if ended:
                break
        assert "".join(texts) == "abcdef"


def test_two_engines(tiny_model: Path) -> None:
    with superllama.LLM(tiny_model, n_threads=1) as one:
        with superllama.LLM(tiny_model, n_threads=1) as two:
            assert two.generate("the", choice=["b"]).text == "b"
        assert one.generate("the", choice=["a"]).text == "a"
        with superllama.LLM(tiny_model, n_threads=1) as three:
            assert three.generate("the", choice=["c"]).text == "c"


def test_budgets_change_while_it_generates(tiny_model: Path) -> None:
    with superllama.LLM(tiny_model, n_threads=1, n_ctx=512, mem_budget="64MiB") as llm:
        assert llm.layers() and sum(llm.memory().values()) > 0
        whole = llm.generate("the", max_tokens=60, temperature=0, cache_prompt=False).text
        found: list[str] = []
        for k, chunk in enumerate(llm.stream("the", max_tokens=60, temperature=0, cache_prompt=False)):
            found.append(chunk.text)
            llm.set_budget("40MiB" if k % 2 else "64MiB")
        assert "".join(found) == whole
        with pytest.raises(superllama.ModelError, match="mem_budget"):
            llm.set_budget(1)
        assert llm.metrics().generated_tokens > 0


FORK = """
import os, sys
import superllama
llm = superllama.LLM(sys.argv[1], n_threads=1)
llm.generate("the", max_tokens=2)
child = os.fork()
if child == 0:
    try:
        llm.generate("the")
    except superllama.ForkedError:
        llm.close()
        os._exit(7)
    os._exit(1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
print(llm.generate("the", choice=["still"]).text)
"""


def test_a_fork_gets_an_error(tiny_model: Path, run_python: Runner) -> None:
    done = run_python(FORK, tiny_model)
    assert done.returncode == 0 and done.stdout == "still\n", done.stderr


EXIT = """
import sys, threading, time
import superllama
llm = superllama.LLM(sys.argv[1], n_threads=1, n_ctx=512)
def work():
    while True:
        for chunk in llm.stream("the", max_tokens=400, ignore_eos=True):
            pass
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
time.sleep(0.5)
print("end")
"""


def test_the_interpreter_ends_while_it_generates(tiny_model: Path, run_python: Runner) -> None:
    for _ in range(3):
        done = run_python(EXIT, tiny_model)
        assert done.returncode == 0 and done.stdout == "end\n", done.stderr


CTRL_C = """
import os, signal, sys, threading, time
import superllama
llm = superllama.LLM(sys.argv[1], n_threads=1, n_ctx=512)
threading.Timer(0.7, os.kill, (os.getpid(), signal.SIGINT)).start()
try:
    while True:
        llm.generate(["the"] * 8, max_tokens=400, ignore_eos=True)
except KeyboardInterrupt:
    print(llm.generate("the", choice=["on"]).text)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGINT"), reason="signals of POSIX")
def test_ctrl_c_cancels_the_request(tiny_model: Path, run_python: Runner) -> None:
    done = run_python(CTRL_C, tiny_model)
    assert done.returncode == 0 and done.stdout == "on\n", done.stderr


def test_memory_is_given_back_and_taken_again(tiny_model: Path) -> None:
    with superllama.LLM(tiny_model, n_ctx=1024, n_parallel=1, n_threads=1, mem_budget="1GiB") as llm:
        prompt = "the " * 100
        expected = llm.generate(prompt, max_tokens=8, temperature=0).tokens
        tokens = llm.facts.tokenize("he")
        llm.set_budget("512MiB")
        llm.pause()
        assert llm.state == "paused"
        for use in (lambda: llm.generate("the"), llm.layers, lambda: llm.set_budget("1GiB"), lambda: llm.tokenize("a")):
            with pytest.raises(superllama.PausedError, match=r"resume\(\)"):
                use()
        llm.resume()
        assert llm.state == "ready" and llm.metrics().mem_budget_bytes == 512 << 20
        assert llm.facts.tokenize("he") == tokens
        found = llm.generate(prompt + "he", max_tokens=8, temperature=0)
        assert found.usage.cached_tokens >= 90
        assert llm.generate(prompt, max_tokens=8, temperature=0, cache_prompt=False).tokens == expected


def test_closing_while_paused(tiny_model: Path) -> None:
    llm = superllama.LLM(tiny_model, n_threads=1)
    llm.pause()
    llm.close()
    assert llm.closed


def test_memory_that_is_given_back_by_itself(tiny_model: Path) -> None:
    with superllama.LLM(tiny_model, n_threads=1, idle_release=0) as llm:
        for _ in range(3):
            while llm.state != "released":
                time.sleep(0.05)
            assert llm.generate("the", max_tokens=2).tokens
