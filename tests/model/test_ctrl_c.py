"""Ctrl-C in calls of the library that take long: it is KeyboardInterrupt, soon, and nothing is lost or left behind."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import tiny_model as tiny
from running import Runner

import superllama
from superllama import _context_base
from superllama._waiting import interruptible

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes")


INTERRUPTED = """
import signal, sys, superllama
signal.signal(signal.SIGINT, signal.default_int_handler)
path = sys.argv[1]
PREPARE
try:
    print("go", flush=True)
    WORK
except KeyboardInterrupt:
    print("KeyboardInterrupt")
except BaseException as e:
    print(type(e).__name__, e)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes a while to load: 0.3 GB that are a hole in the file."""
    return tiny.write_zeros(tmp_path_factory.mktemp("large") / "zeros.gguf", 1024, 6, 2816)


LONG_CALLS = {
    "load": ("", "while True: superllama.Model(path, load_mode='none', progress=False).close()"),
    "load with a callback": ("", "while True: superllama.Model(path, load_mode='none', progress=lambda p: 1).close()"),
    "load in layers": ("", "while True: superllama.Model(path, dynamic_layers=True, progress=False).close()"),
    "context": (
        "model = superllama.Model(path, progress=False)",
        "while True: superllama.Context(model, n_ctx=20000).close()",
    ),
    "decode": (
        "ctx = superllama.Context(path, n_ctx=2048, n_ubatch=2048, n_threads=1)",
        "while True: ctx.clear(); ctx.decode([5] * 2000)",
    ),
    "generate": ("ctx = superllama.Context(path, n_threads=1)", "list(ctx.generate('the', ignore_eos=True))"),
    "embed": (
        "ctx = superllama.Context(path, n_ctx=512, embeddings=True, pooling='mean', n_threads=1)",
        "while True: ctx.embed([5] * 500)",
    ),
    "state": (
        "ctx = superllama.Context(path, n_ctx=512, n_threads=1); ctx.decode([5] * 400)",
        "while True: ctx.state_load(ctx.state_save())",
    ),
    "tokenize": (
        "model = superllama.Model(path, progress=False)",
        "while True: model.tokenize('the one of ' * 100000)",
    ),
    "plan": ("", "while True: superllama.plan(path, mem_budget='1GiB')"),
    "set_budget": (
        "model = superllama.Model(path, mem_budget='1GiB', progress=False)",
        "while True: model.set_budget('400MiB'); model.set_budget('1GiB')",
    ),
    "first use": ("", "superllama.LLM; superllama.plan; signal.pause()"),
}


@pytest.mark.parametrize("call", LONG_CALLS)
def test_ctrl_c_in_a_long_call_is_keyboard_interrupt(large: Path, call: str) -> None:
    """Sent from outside at several moments: wherever Python is when it hears it, it is that and no other error."""
    prepare, work = LONG_CALLS[call]
    script = INTERRUPTED.replace("PREPARE", prepare).replace("WORK", work)
    for delay in (0.1, 0.25, 0.43) if call != "first use" else [0.02 * i for i in range(1, 20)]:
        command = [sys.executable, "-c", script, str(large)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = process.stdout.readline()
            time.sleep(delay)
            process.send_signal(signal.SIGINT)
            sent = time.monotonic()
            out, err = process.communicate(timeout=60)
        assert (first, out, process.returncode) == ("go\n", "KeyboardInterrupt\n", 0), err
        assert err == ""  # nor is it printed where nobody can catch it
        assert time.monotonic() - sent < 20


def test_an_interrupted_decode_leaves_the_sequence_as_it_was(large: Path, run_python: Runner) -> None:
    script = """
import signal, sys, superllama
signal.signal(signal.SIGINT, signal.default_int_handler)
ctx = superllama.Context(sys.argv[1], n_ctx=2048, n_ubatch=2048, n_threads=1)
ctx.decode([5, 6, 7])
signal.signal(signal.SIGALRM, lambda *a: signal.raise_signal(signal.SIGINT))
signal.setitimer(signal.ITIMER_REAL, 0.3)
try:
    ctx.decode([5] * 2000)
except KeyboardInterrupt:
    print("interrupted", ctx.seq_pos_max())
ctx.decode([8])
print(ctx.seq_pos_max())
"""
    done = run_python(script, large)
    assert (done.returncode, done.stdout) == (0, "interrupted 2\n3\n"), done.stderr


def test_what_an_interrupted_call_made_is_given_back() -> None:
    undone: list[str] = []
    stopped: list[bool] = []

    def work() -> str:
        time.sleep(0.4)
        return "made"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(KeyboardInterrupt):
            interruptible(work, stop=lambda: stopped.append(True), undo=undone.append)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert (undone, stopped) == (["made"], [True])


def test_what_cannot_be_stopped_is_not_waited_for() -> None:
    """Ctrl-C is raised while the work goes on, which is undone where it ends, inside what it was done in."""
    go_on, undone = threading.Event(), threading.Event()
    happened: list[str] = []

    def work() -> str:
        signal.raise_signal(signal.SIGALRM)  # heard by the main thread, which waits
        assert go_on.wait(60)
        return "made"

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        happened.append("in")
        yield
        happened.append("out")
        undone.set()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            interruptible(work, stop=None, undo=happened.append, within=within)
    finally:
        signal.signal(signal.SIGALRM, old)
    assert happened == ["in"]
    go_on.set()
    assert undone.wait(60)
    assert happened == ["in", "made", "out"]


@pytest.mark.parametrize("owned", [False, True])
def test_a_context_that_nobody_waits_for_is_freed_before_its_model(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, owned: bool
) -> None:
    real, free, go_on, freed = _context_base.collected_errors, _context_base._free_context, threading.Event(), []

    @contextlib.contextmanager
    def slow() -> Iterator[Any]:
        """Around the library's call: a context takes until `go_on`."""
        signal.raise_signal(signal.SIGALRM)
        assert go_on.wait(60)
        with real() as errors:
            yield errors

    def noted(pointer: Any, made_in: int, flag: Any, model: superllama.Model) -> None:
        freed.append(model.closed)
        free(pointer, made_in, flag, model)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    loaded: list[superllama.Model] = []
    monkeypatch.setattr(_context_base, "collected_errors", slow)
    monkeypatch.setattr(_context_base, "_free_context", noted)
    monkeypatch.setattr(_context_base, "Model", _noting(loaded))
    model = None if owned else _context_base.Model(tiny_model)
    old = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            superllama.Context(model or tiny_model, n_ctx=256)
    finally:
        signal.signal(signal.SIGALRM, old)
    (used,) = loaded
    assert (freed, used.closed) == ([], False)
    go_on.set()
    if model:
        model.close()  # waits
    with used._lock:  # waits too, for the one who closes it otherwise
        assert (freed, used.closed) == ([False], True)


def _noting(loaded: list[superllama.Model]) -> type[superllama.Model]:
    class Noted(superllama.Model):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            loaded.append(self)

    return Noted


def test_a_long_text_is_tokenized_as_it_is_elsewhere(model: superllama.Model) -> None:
    """The main thread lets another one do it, and the text is not cut: tokens would be others at the cuts."""
    text = "the one of  " * 5000
    with ThreadPoolExecutor(1) as pool:
        elsewhere = pool.submit(model.tokenize, text).result()
    assert model.tokenize(text) == elsewhere
    with pytest.raises(superllama.ModelError, match="closed"):
        model.close()
        model.tokenize(text)
