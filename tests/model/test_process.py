"""Processes: what the interpreter's end stops, and what a fork may not use."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest
from running import Runner

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
import atexit, sys, threading, time
said = threading.Event()
atexit.register(said.wait, 30) # runs after the package's own, which come later
import superllama
def excepthook(args):
    print(args.exc_type.__name__, flush=True)
    said.set()
threading.excepthook = excepthook
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
