"""Completion: what is offered where, and that bash, zsh and fish take it."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from running import Runner

from superllama import _programs, cli
from superllama._commands import completion as _completion
from superllama._commands.program_flags import flags_of
from superllama._commands.shells import PROGRAMS, script

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="shells of POSIX")

MODEL = "lmstudio:org/repo/m.gguf"
MAIN = """#!{python}
import sys
from superllama.cli import main
sys.exit(main())
"""


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with one model, a folder to stand in, and `superllama` on the path."""
    for variable in ("OLLAMA_MODELS", "HF_HUB_CACHE", "LLAMA_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    monkeypatch.setenv("LMSTUDIO_MODELS", str(tmp_path / "models"))
    (tmp_path / "models/org/repo").mkdir(parents=True)
    (tmp_path / "models/org/repo/m.gguf").write_bytes(b"GGUF")
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/superllama"
    command.write_text(MAIN.format(python=sys.executable))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "here/sub").mkdir(parents=True)
    for name in ("a.gguf", "b c.gguf", "x.txt"):
        (tmp_path / "here" / name).touch()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path


def offered(line: str) -> tuple[list[str], str]:
    """The words and the pattern of files that a command line gets at its end."""
    files, *lines = _completion.answer(cli.parser(), line.split(" ")).split("\n")
    return [text.split("\t")[0] for text in lines], files


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("superllama pl", ["plan"]),
        ("superllama plan --mem", ["--mem-budget"]),
        ("superllama plan --for s", ["server"]),
        ("superllama plan --for=s", ["--for=server"]),
        ("superllama cache ", ["list", "prune"]),
        ("superllama cache prune --dr", ["--dry-run"]),
        ("superllama completion ", ["bash", "zsh", "fish"]),
        ("superllama nothing ", []),
        ("superllama budget 4GiB --vr", ["--vram"]),
        ("superllama _", []),
        ("superllama-server -fa ", ["on", "off", "auto"]),
        ("superllama-server -fa on --mem-b", ["--mem-budget"]),
        ("superllama-server -c --mem-b", []),  # the value of -c
        ("superllama-rpc-server --po", ["--port"]),
        ("superllama serve --conf", ["--config"]),
        ("superllama serve x.gguf -fa o", ["on", "off"]),
        ("superllama bench --rep", ["--repetitions", "--repack"]),
        ("superllama bench --conf", []),
        ("superllama run x --single-t", ["--single-turn"]),
    ],
)
def test_words_that_fit(line: str, words: list[str]) -> None:
    assert offered(line) == (words, "")


@pytest.mark.parametrize(
    "line",
    [
        *("superllama plan ", "superllama plan -m ", "superllama serve ", "superllama serve -c 5 lmst"),
        *("superllama-server -m ", "superllama-cli --model lmstudio:"),
    ],
)
def test_models_have_names(machine: Path, line: str) -> None:
    assert offered(line) == ([MODEL], "*.gguf")


@pytest.mark.parametrize(
    "line",
    ["superllama doctor ", "superllama-server --lora ", "superllama serve --config ", "superllama-quantize x"],
)
def test_files(line: str) -> None:
    assert offered(line) == ([], "*")


def test_all_that_help_shows_is_offered() -> None:
    commands, _ = offered("superllama ")
    assert {"plan", "doctor", "serve", "run", "cache"} <= set(commands) and "_complete" not in commands
    assert offered("superllama-perplexity -")[0] == [n for flag in flags_of("llama-perplexity") for n in flag.names]
    assert {"--url", "--api-key", "--json"} <= set(offered("superllama ps -")[0])


def test_programs_are_those_of_the_package() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert all(f"\n{name} = " in text for name in PROGRAMS)
    assert text.count("superllama._programs:") == len(PROGRAMS)
    for shell in cli.SHELLS:
        assert all(name in script(shell) for name in ["superllama", *PROGRAMS])


def test_programs_print_the_names_of_their_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["superllama-server", "--completion-bash"])
    with pytest.raises(SystemExit) as e:
        _programs.server()
    assert e.value.code is None and capsys.readouterr().out == script("bash")


def test_nothing_slow_is_imported(run_python: Runner) -> None:
    script = """
import sys
from superllama.cli import main
main(["_complete", "superllama", "plan", ""])
main(["_complete", "superllama-server", "--mem"])
assert not {"numpy", "pydantic", "rich", "superllama._native"} & set(sys.modules), sys.modules.keys()
"""
    done = run_python(script)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- shells


def shell_or_skip(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"there is no {name} on this machine")
    return found


def bash(machine: Path, *words: str) -> list[str]:
    """What bash would put in the place of the last word, where it takes words apart as bash does."""
    script = """
source <(superllama completion bash)
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_superllama
((${#COMPREPLY[@]})) && printf '%s\\n' "${COMPREPLY[@]}"
"""
    command = [shell_or_skip("bash"), "-c", script, "bash", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return sorted(done.stdout.splitlines())


def test_bash(machine: Path) -> None:
    assert bash(machine, "superllama", "pl") == ["plan"]
    assert bash(machine, "superllama", "plan", "--for", "=", "s") == ["server"]
    assert bash(machine, "superllama", "plan", "lmstudio", ":", "o") == ["org/repo/m.gguf"]
    assert bash(machine, "superllama", "plan", "lmstudio", ":") == ["org/repo/m.gguf"]
    assert bash(machine, "superllama-server", "-m", "") == ["a.gguf", "b\\ c.gguf", MODEL, "sub/"]
    assert bash(machine, "superllama", "doctor", "") == ["a.gguf", "b c.gguf", "sub", "x.txt"]
    assert bash(machine, "superllama-server", "--mem-b") == ["--mem-budget"]
    assert bash(machine, "superllama", "nothing", "") == []


def fish(line: str) -> dict[str, str]:
    script = 'superllama completion fish | source; complete --do-complete "$argv[1]"'
    command = [shell_or_skip("fish"), "--no-config", "-c", script, line]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return {word: about for word, _, about in (text.partition("\t") for text in done.stdout.splitlines())}


def test_fish(machine: Path) -> None:
    assert fish("superllama pl") == {"plan": "what a model would do here under a budget, before it is loaded"}
    assert list(fish("superllama plan --for=s")) == ["--for=server"]
    assert list(fish("superllama plan lmstudio:o")) == [MODEL]
    assert {"a.gguf", "b c.gguf", MODEL, "sub/"} <= set(fish("superllama-server -m "))
    assert set(fish("superllama doctor ")) == {"a.gguf", "b c.gguf", "sub/", "x.txt"}
    assert list(fish("superllama-server --mem-b")) == ["--mem-budget"]


def typed(shell: list[str], setup: str, line: str, expected: str) -> str:
    """What a terminal shows when the line is typed and completed, until that is `expected`, or a minute has passed."""
    process, terminal = pty.fork()
    if process == 0:
        os.execvpe(shell[0], shell, os.environ | {"TERM": "dumb", "PS1": "$ "})
    try:
        os.write(terminal, f"{setup}; echo re''ady\n".encode())
        before = shown(terminal, "ready\r\n")
        os.write(terminal, f"{line}\t".encode())
        return shown(terminal, expected) if "ready" in before else before
    finally:
        os.kill(process, 9)
        os.waitpid(process, 0)
        os.close(terminal)


def shown(terminal: int, expected: str) -> str:
    text, end = "", time.monotonic() + 60
    while expected not in text and time.monotonic() < end:
        if select.select([terminal], [], [], 0.5)[0]:
            text += os.read(terminal, 1 << 16).decode(errors="replace").replace("\a", "")
    return text


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("superllama pl", "superllama plan "),
        ("superllama plan --for=s", "--for=server "),
        ("superllama plan --for s", "--for server "),
        ("superllama plan lmstudio:", f"plan {MODEL} "),
        ("superllama doctor x", "doctor x.txt "),
        ("superllama-server --mem-", "--mem-pressure "),
    ],
)
def test_zsh(machine: Path, line: str, expected: str) -> None:
    shell = [shell_or_skip("zsh"), "-f", "-i"]
    setup = "autoload -Uz compinit; compinit -u -D; source <(superllama completion zsh); setopt no_beep"
    assert expected in typed(shell, setup, line, expected)


def test_a_name_is_typed_in_bash(machine: Path) -> None:
    shell = [shell_or_skip("bash"), "--norc", "-i"]
    setup = "source <(superllama completion bash); bind 'set bell-style none'"
    assert f"plan {MODEL}" in typed(shell, setup, "superllama plan lmst", f"plan {MODEL}")
    assert "superllama plan " in typed(shell, setup, "superllama pl", "superllama plan ")
