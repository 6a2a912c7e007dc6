"""Processes: the interpreter's end, forks, Ctrl-C, and paths that are no files."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
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

# ---------------------------------------------------------------- the end of the interpreter

WHILE = {
    "generates": 'list(ctx.generate("the", ignore_eos=True))',
    "generates again and again": 'while True: list(ctx.generate("the", ignore_eos=True, max_tokens=5))',
    "saves states": "while True: ctx.state_save()",
    "asks for metrics": "while True: ctx.metrics()",
    "loads": "while True: superllama.Model(sys.argv[1], progress=False).close()",
    "tokenizes": 'while True: model.tokenize("the one of " * 1000)',
}


@pytest.mark.parametrize("work", WHILE)
@pytest.mark.parametrize("kwargs", ["{}", "{'dynamic_layers': True}"])
def test_the_interpreter_ends_while_a_daemon_thread_works(
    tiny_model: Path, run_python: Runner, work: str, kwargs: str
) -> None:
    script = f"""
import sys, threading, time, superllama
threading.excepthook = lambda args: None  # what is closed under a thread raises in it
model = superllama.Model(sys.argv[1], **{kwargs})
ctx = superllama.Context(model, n_ctx=512, n_threads=1)
def work():
    {WHILE[work]}
threading.Thread(target=work, daemon=True).start()
time.sleep(0.2)
"""
    for _ in range(3):  # the moment at which it ends is another one each time
        start = time.monotonic()
        done = run_python(script, tiny_model)
        assert (done.returncode, done.stderr) == (0, "")
        assert time.monotonic() - start < 20


def test_a_load_is_stopped_before_the_interpreter_ends(tiny_model: Path, run_python: Runner) -> None:
    """A callback that is on its way then has its turn; later there would be no Python to come back to, and the thread
    would be ended inside the library."""
    script = """
import sys, threading, time, superllama
threading.excepthook = lambda args: print(args.exc_type.__name__, flush=True)
begun = threading.Event()
def progress(share):
    begun.set()
    time.sleep(0.3)
threading.Thread(target=superllama.Model, args=sys.argv[1:], kwargs={"progress": progress}, daemon=True).start()
begun.wait()
"""
    done = run_python(script, tiny_model)
    assert (done.returncode, done.stdout, done.stderr) == (0, "CancelledError\n", "")


# ---------------------------------------------------------------- fork

FORK = """
import os, sys, time, superllama
model = superllama.Model(sys.argv[1], **eval(sys.argv[3]))
ctx = superllama.Context(model, n_ctx=256, n_threads=2)
list(ctx.generate("the", max_tokens=2, ignore_eos=True))
generator = ctx.generate("the", max_tokens=9, ignore_eos=True)
next(generator)
pid = os.fork()
if pid == 0:
    try:
        exec(sys.argv[2])
        print("nothing raised", flush=True)
    except superllama.Error as e:
        print(type(e).__name__, flush=True)
    sys.exit(0)
deadline = time.monotonic() + 20
while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
    if time.monotonic() > deadline:
        os.kill(pid, 9)
        sys.exit("the child hangs")
    time.sleep(0.02)
print(ended[1], len(list(generator)))  # the parent goes on
"""


@pytest.mark.parametrize("kwargs", ["{}", "{'dynamic_layers': True, 'async_prefetch': True}"])
@pytest.mark.parametrize(
    ("use", "says"),
    [
        ("list(ctx.generate('the', max_tokens=2))", "ForkedError"),
        ("next(generator)", "ForkedError"),
        ("ctx.decode([5])", "ForkedError"),
        ("ctx.metrics()", "ForkedError"),
        ("ctx.state_save()", "ForkedError"),
        ("model.tokenize('the')", "ForkedError"),
        ("model.set_budget('1GiB')", "ForkedError"),
        ("superllama.Context(model)", "ForkedError"),
        ("superllama.Context(sys.argv[1])", "ForkedError"),
        ("superllama.plan(sys.argv[1])", "ForkedError"),
        ("ctx.close(); model.close(); assert model.closed and ctx.closed", "nothing raised"),
        ("del generator, ctx, model", "nothing raised"),
        ("pass", "nothing raised"),
    ],
)
def test_a_fork_is_told_at_once_and_ends(
    tiny_model: Path, run_python: Runner, use: str, says: str, kwargs: str
) -> None:
    done = run_python(FORK, tiny_model, use, kwargs)
    assert (done.returncode, done.stdout.split("\n")[:2]) == (0, [says, "0 8"]), done.stderr


def test_a_fork_after_a_plan_is_told_too(tiny_model: Path, run_python: Runner) -> None:
    """A plan computes, to measure the CPU, without a context."""
    script = """
import os, sys, superllama
superllama.plan(sys.argv[1])
if (pid := os.fork()) == 0:
    try:
        superllama.plan(sys.argv[1])
    except superllama.ForkedError as e:
        print(e, flush=True)
    os._exit(0)
sys.exit(os.waitpid(pid, 0)[1])
"""
    done = run_python(script, tiny_model)
    assert (done.returncode, "made a plan" in done.stdout) == (0, True), done.stderr


def test_a_fork_before_the_first_context_computes(tiny_model: Path, run_python: Runner) -> None:
    script = """
import os, sys, superllama
superllama.Model(sys.argv[1], vocab_only=True).tokenize("the")
if (pid := os.fork()) == 0:
    print(len(list(superllama.Context(sys.argv[1]).generate("the", max_tokens=3, ignore_eos=True))), flush=True)
    os._exit(0)
sys.exit(os.waitpid(pid, 0)[1])
"""
    done = run_python(script, tiny_model)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr


# ---------------------------------------------------------------- Ctrl-C

INTERRUPTED = """
import signal, sys, superllama
signal.signal(signal.SIGINT, signal.default_int_handler)
path = sys.argv[1]
superllama.ModelParams(mem_budget="1GiB", vram_budget=["1GiB"])  # pydantic imports what it needs, which is not ours
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
}


@pytest.mark.parametrize("call", LONG_CALLS)
def test_ctrl_c_in_a_long_call_is_keyboard_interrupt(large: Path, call: str) -> None:
    """Sent from outside at several moments: wherever Python is when it hears it, it is that and no other error."""
    prepare, work = LONG_CALLS[call]
    script = INTERRUPTED.replace("PREPARE", prepare).replace("WORK", work)
    for delay in (0.1, 0.25, 0.43):
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


# ---------------------------------------------------------------- paths that are no files


@pytest.fixture(params=["FIFO", "socket", "device", "folder"])
def no_file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    path = tmp_path / "x"
    if request.param == "FIFO":
        os.mkfifo(path)
    elif request.param == "socket":
        monkeypatch.chdir(tmp_path)  # the names of sockets are short
        server = socket.socket(socket.AF_UNIX)
        server.bind("x")
        request.addfinalizer(server.close)
    elif request.param == "folder":
        path.mkdir()
    else:
        path = Path("/dev/null")
    return request.param, path


def test_a_path_that_is_no_file_is_an_error_at_once(
    no_file: tuple[str, Path], model: superllama.Model, ctx: superllama.Context
) -> None:
    kind, path = no_file
    for use in (
        superllama.Model,
        superllama.Context,
        superllama.plan,
        model.load_lora,
        ctx.state_load_file,
        ctx.state_save_file,
    ):
        with pytest.raises((superllama.ModelError, superllama.StateError), match=kind):
            use(path)
    assert path.exists()  # nothing took its place


def test_another_part_of_a_model_that_is_no_file(tiny_model: Path, tmp_path: Path) -> None:
    first = tmp_path / "m-00001-of-00002.gguf"
    first.write_bytes(tiny_model.read_bytes())
    os.mkfifo(tmp_path / "m-00002-of-00002.gguf")
    with pytest.raises(superllama.ModelError, match=r"00002-of-00002\.gguf is a FIFO"):
        superllama.Model(first)


def test_a_link_to_a_state_stays_a_link(ctx: superllama.Context, tmp_path: Path) -> None:
    ctx.decode([5, 6])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ctx.state_save_file(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    ctx.state_load_file(tmp_path / "real")
    assert ctx.seq_pos_max() == 1


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("who", ["Python", "the library"])
def test_a_limit_of_open_files_is_named(tiny_model: Path, run_python: Runner, who: str) -> None:
    """The library opens more files than Python does before it: the parts of a split model."""
    script = """
import os, pathlib, resource, sys, superllama
superllama.Model(sys.argv[1]).close()  # what the first load opens besides is not what is asked here
if sys.argv[2] == "the library":
    superllama._model.check_gguf = pathlib.Path
n = os.open(os.devnull, os.O_RDONLY) + 1
resource.setrlimit(resource.RLIMIT_NOFILE, (n, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    superllama.Model(sys.argv[1])
except superllama.ModelError as e:
    print(str(e).replace(f" {n} ", " N "))
"""
    done = run_python(script, tiny_model, who)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Too many open files\)?; the limit of this process is N open files; raise it", done.stdout)
