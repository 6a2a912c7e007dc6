"""Processes: the interpreter's end, forks, Ctrl-C, and paths that are no files."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny_model as tiny
from running import Runner

import superllama
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
