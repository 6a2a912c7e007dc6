"""Console scripts: which command lines get the demo model, and that programs keep their exit codes and signals."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
from running import Runner

from superllama._programs import (
    MODEL_OPTIONS,
    MODEL_VARIABLES,
    find_program,
    names_model,
    separated,
    server_environment,
)

POSIX = pytest.mark.skipif(sys.platform == "win32", reason="POSIX programs")


@pytest.mark.parametrize(
    "line",
    [
        "-m x.gguf",
        "--model x.gguf",
        "--model=x.gguf",
        "-mx.gguf",
        "--hf-repo=user/repo",
        "-p hello -m x.gguf",
        "-hf user/repo",
        "-hfr user/repo",
        "--hf-repo user/repo:Q4_0",
        "-mu https://example.org/x.gguf",
        "--model-url https://example.org/x.gguf",
        "-dr ai/x",
        "--docker-repo ai/x",
        "--models-dir /models",
        "--models-preset p.ini",
        "--server-base http://localhost:8080",
        "--gpt-oss-20b-default",
        "-h",
        "--help",
        "--usage",
        "--version",
        "--list-devices",
        "--cache-list",
        "-cl",
        "--completion-bash",
    ],
)
def test_no_default_model(line: str) -> None:
    assert names_model(line.split(), {})


@pytest.mark.parametrize("line", ["", "-p hello", "-n 16 --temp 0", "-p x --metrics-file m.jsonl", "--model-alias x"])
def test_default_model(line: str) -> None:
    assert not names_model(line.split(), {"LLAMA_ARG_CTX_SIZE": "512", "LLAMA_ARG_MODEL": ""})


@pytest.mark.parametrize("option", sorted(MODEL_OPTIONS))
def test_an_option_and_its_value_in_one_argument(option: str) -> None:
    assert names_model([f"{option}=x"], {})
    assert separated(["-p", "a=b", f"{option}=x=y"]) == ["-p", "a=b", option, "x=y"]


def test_what_only_looks_like_a_model_option() -> None:
    line = ["-mg", "1", "-mmap", "--models=x", "--model=", "x=-m"]
    assert separated(line) == line
    assert separated(["-m/a b.gguf"]) == ["-m", "/a b.gguf"]


@pytest.mark.parametrize("name", MODEL_VARIABLES)
def test_a_variable_names_the_model(name: str) -> None:
    assert names_model(["-p", "hello"], {name: "x"})


# ---------------------------------------------------------------- run

# runs superllama-<argv[2]> with the programs of folder argv[1]; the demo model is "/demo.gguf"
SCRIPT = """
import sys
from pathlib import Path
from superllama import _demo, _programs
folder, entry, *arguments = sys.argv[1:]
_programs.find_bin_dir = lambda: Path(folder)
_demo.demo_model = lambda: Path("/demo.gguf")
sys.argv = ["superllama-" + entry, *arguments]
getattr(_programs, entry)()
"""

FAKE = f"""#!{sys.executable}
import json, os, sys, signal
arguments = sys.argv[1:]
print(json.dumps(arguments), flush=True)
if "--exit" in arguments:
    sys.exit(int(arguments[arguments.index("--exit") + 1]))
if "--kill" in arguments:
    os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    tools = ("cli", "completion", "server", "bench", "perplexity", "quantize")
    for name in [*(f"llama-{tool}" for tool in tools), "ggml-rpc-server"]:
        program = tmp_path / name
        program.write_text(FAKE)
        program.chmod(0o755)
    return tmp_path


@POSIX
@pytest.mark.parametrize("entry", ["cli", "completion", "server", "bench", "perplexity"])
def test_the_demo_model_is_added(bin_dir: Path, run_python: Runner, entry: str) -> None:
    done = run_python(SCRIPT, bin_dir, entry, "-p", "a  b", env=clean_environment())
    assert json.loads(done.stdout) == ["-p", "a  b", "-m", "/demo.gguf"]
    (bin_dir / "x.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))
    done = run_python(SCRIPT, bin_dir, entry, "-m", bin_dir / "x.gguf", env=clean_environment())
    assert json.loads(done.stdout) == ["-m", str(bin_dir / "x.gguf")]


@POSIX
@pytest.mark.parametrize("entry", ["quantize", "rpc_server"])
def test_programs_without_a_model(bin_dir: Path, run_python: Runner, entry: str) -> None:
    assert json.loads(run_python(SCRIPT, bin_dir, entry, "x", env=clean_environment()).stdout) == ["x"]


@POSIX
def test_bench_reads_no_variables(bin_dir: Path, run_python: Runner) -> None:
    environment = {**clean_environment(), "LLAMA_ARG_MODEL": "x"}
    assert json.loads(run_python(SCRIPT, bin_dir, "cli", env=environment).stdout) == []
    assert json.loads(run_python(SCRIPT, bin_dir, "bench", env=environment).stdout) == ["-m", "/demo.gguf"]


@POSIX
@pytest.mark.parametrize("entry", ["cli", "completion", "server", "perplexity"])
def test_a_missing_model_is_one_line(bin_dir: Path, run_python: Runner, entry: str) -> None:
    done = run_python(SCRIPT, bin_dir, entry, "-p", "hello", "-m", "missing.gguf")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("superllama: missing.gguf does not exist")
    assert len(done.stderr.splitlines()) == 1


@POSIX
@pytest.mark.parametrize("argument", ["--model=missing.gguf", "-mmissing.gguf"])
def test_a_missing_model_in_one_argument_fetches_no_other(bin_dir: Path, run_python: Runner, argument: str) -> None:
    done = run_python(SCRIPT, bin_dir, "cli", argument)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("superllama: missing.gguf does not exist")


@POSIX
@pytest.mark.parametrize("line", ["-m new.gguf -mu https://example.org/x.gguf", "-hf a/b -m new.gguf", "-p x -m"])
def test_a_model_that_is_yet_to_come(bin_dir: Path, run_python: Runner, line: str) -> None:
    done = run_python(SCRIPT, bin_dir, "cli", *line.split())
    assert json.loads(done.stdout) == line.split()


@POSIX
def test_exit_codes_and_signals_are_kept(bin_dir: Path, run_python: Runner) -> None:
    assert run_python(SCRIPT, bin_dir, "quantize", "--exit", "7").returncode == 7
    assert run_python(SCRIPT, bin_dir, "quantize", "--exit", "0").returncode == 0
    assert run_python(SCRIPT, bin_dir, "quantize", "--kill").returncode == -signal.SIGTERM


def test_a_missing_program_is_one_line(tmp_path: Path, run_python: Runner) -> None:
    done = run_python(SCRIPT, tmp_path, "quantize", "x")
    assert done.returncode == 1
    assert "llama-quantize is not installed" in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["llama-cli", "llama-completion", "llama-server", "llama-bench", "ggml-rpc-server"])
def test_the_package_has_its_programs(name: str) -> None:
    assert os.access(find_program(name), os.X_OK)


def clean_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("LLAMA_ARG_")}


def test_environment_of_the_rpc_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Freed layers go back to the system; the user's own settings win."""
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert "mmap_threshold" in server_environment()["GLIBC_TUNABLES"]
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=0")
    assert server_environment()["GLIBC_TUNABLES"] == "glibc.malloc.check=0"
    assert server_environment()["PATH"] == os.environ["PATH"]


@POSIX
@pytest.mark.parametrize(
    "option", ["--lora", "--lora-scaled", "--control-vector", "--mmproj", "--model-draft", "--prompt-cache"]
)
def test_a_fifo_is_no_file(bin_dir: Path, run_python: Runner, tmp_path: Path, option: str) -> None:
    """A program would wait for its other end."""
    fifo, file = tmp_path / "fifo", tmp_path / "file"
    os.mkfifo(fifo)
    file.touch()
    scaled = option == "--lora-scaled"
    for value in (f"{fifo}{':0.5' * scaled}", f"{file}{':1' * scaled},{fifo}{':0.5' * scaled}"):
        done = run_python(SCRIPT, bin_dir, "cli", option, value, env=clean_environment())
        assert (done.returncode, done.stdout) == (1, "") and f"{fifo} is a FIFO" in done.stderr
    done = run_python(SCRIPT, bin_dir, "cli", option, file, "-p", fifo, env=clean_environment())
    assert json.loads(done.stdout)[:2] == [option, str(file)]


@POSIX
def test_quantize_takes_no_fifo(bin_dir: Path, run_python: Runner, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    done = run_python(SCRIPT, bin_dir, "quantize", tmp_path / "fifo", "x.gguf", "Q4_0", env=clean_environment())
    assert (done.returncode, done.stdout) == (1, "") and "is a FIFO" in done.stderr
