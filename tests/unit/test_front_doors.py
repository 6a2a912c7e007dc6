"""run, chat, serve and bench: what they hand to which program."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from superllama import _programs, cli
from superllama._commands import run as _run
from superllama._engine.options import arguments

Start = Callable[..., list[str]]
DEMO = "/demo.gguf"


def line(text: str) -> list[str]:
    """The words of a command line."""
    return text.split()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Start:
    """The program and its arguments that a command line starts; "answer", arguments and prompt where none is."""
    for name in [*_programs.MODEL_VARIABLES, "LLAMA_ARG_CTX_SIZE"]:
        monkeypatch.delenv(name, raising=False)

    def started(*words: object, stdin: io.StringIO | None = None) -> list[str]:
        found: list[str] = []

        def run(program: str, arguments: list[str]) -> None:
            found.extend([program, *arguments])
            raise SystemExit(0)

        with monkeypatch.context() as patch:
            patch.setattr(_programs, "run", run)
            patch.setattr(_run, "answer", lambda arguments, prompt: found.extend(["answer", *arguments, prompt]))
            patch.setattr("superllama._demo.demo_model", lambda: DEMO)
            patch.setattr("sys.stdin", stdin or Terminal())
            try:
                assert cli.main(list(map(str, words))) == 0
            except SystemExit as e:
                assert e.code == 0, e.code
        return found

    return started


def test_a_model_and_flags(start: Start, tiny_model: Path) -> None:
    model = ["-m", str(tiny_model)]
    assert start("serve", tiny_model) == ["llama-server", *model]
    assert start("serve", tiny_model, "-c", 512, "--port", 8081) == [
        "llama-server",
        *model,
        *line("-c 512 --port 8081"),
    ]
    assert start("serve", "-c", 512, tiny_model) == ["llama-server", *model, "-c", "512"]
    assert start("serve", "--ctx_size=512", tiny_model) == ["llama-server", *model, "--ctx-size", "512"]
    assert start("chat", tiny_model, "--temp", 0) == ["llama-cli", *model, "--temp", "0"]
    assert start("bench", tiny_model, "-p", "64,128", "-n", 0) == ["llama-bench", *model, *line("-p 64,128 -n 0")]
    assert start("run", tiny_model) == ["llama-cli", *model]


def test_models_have_names(start: Start, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert start("serve", "hf:org/repo:Q8_0") == ["llama-server", "-hf", "org/repo:Q8_0"]
    (tmp_path / "org/repo").mkdir(parents=True)
    (tmp_path / "org/repo/m.gguf").write_bytes(tiny_model.read_bytes())
    monkeypatch.setenv("LMSTUDIO_MODELS", str(tmp_path))
    assert start("serve", "lmstudio:org/repo/m.gguf") == ["llama-server", "-m", str(tmp_path / "org/repo/m.gguf")]
    assert start("serve") == ["llama-server", "-m", DEMO]
    assert start("serve", "-hf", "org/repo") == ["llama-server", "-hf", "org/repo"]


def test_a_prompt_is_answered(start: Start) -> None:
    assert start("run", "x.gguf", "Hello") == ["answer", "-m", "x.gguf", "Hello"]
    assert start("run", "x.gguf", "Hello", "there", "-n", 5) == ["answer", "-m", "x.gguf", "-n", "5", "Hello there"]
    assert start("run", "-n", -1, "x.gguf", "- a\n- b") == ["answer", "-m", "x.gguf", "-n", "-1", "- a\n- b"]
    assert start("run", "-m", "x.gguf", "Hello") == ["answer", "-m", "x.gguf", "Hello"]
    assert start("run", "x.gguf", stdin=io.StringIO("Hello\n")) == ["answer", "-m", "x.gguf", "Hello"]
    assert start("run", stdin=io.StringIO("Hello")) == ["answer", "Hello"]


def test_an_answer_takes_the_flags_of_the_server() -> None:
    words = line("-m a.gguf -c 64 -nkvo --temp 0 -sys Brief. --no-repack --mem-budget 1GiB")
    assert _run._sorted(words) == (
        "a.gguf",
        "Brief.",
        {"ctx_size": "64", "no_kv_offload": True, "temp": "0", "no_repack": True, "mem_budget": "1GiB"},
    )
    assert _run._sorted(["-hf", "org/repo"])[0] == "hf:org/repo"


def test_what_python_has_as_an_object_is_a_text_here(tiny_model: Path) -> None:
    found = arguments(str(tiny_model), {"flags": {"chat_template_kwargs": '{"a": 1}', "lora_scaled": "x.gguf:0.5"}})
    assert found[2:6] == ["--chat-template-kwargs", '{"a": 1}', "--lora-scaled", "x.gguf:0.5"]


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["serve", "--ctx-sise", "5"], "there is no flag --ctx-sise; did you mean --ctx-size?"),
        (["serve", "a.gguf", "b.gguf"], "'b.gguf' is neither the model nor a flag"),
        (["bench", "--config", "x"], "there is no flag --config"),
        (["run", "--config"], "--config names a file"),
        (["run", "a.gguf", "Hello", "--simple-io"], "--simple-io means nothing where one prompt is answered"),
        (["run", "a.gguf", "Hello", "-c"], "-c wants a value"),
        (["serve", "--config", "none.toml"], "none.toml"),
    ],
)
def test_what_means_nothing_is_one_line(words: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 1
    error = capsys.readouterr().err
    assert why in error and error.startswith("superllama: ") and error.count("\n") == 1


def test_nothing_on_stdin_is_no_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(" \n"))
    assert cli.main(["run", "a.gguf"]) == 1
    assert "there is no prompt" in capsys.readouterr().err


def test_help_is_that_of_the_program_too(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    assert start("serve", "x", "-h") == ["llama-server", "--help"]
    assert "superllama serve [MODEL] [--config FILE] [FLAG...]" in capsys.readouterr().out


# ---------------------------------------------------------------- with a file of settings


@pytest.fixture
def one(tmp_path: Path, tiny_model: Path) -> Path:
    file = tmp_path / "one.toml"
    file.write_text(f'model = "{tiny_model}"\nctx-size = 512\nport = 8081\nsystem-prompt = "Brief."\n')
    return file


@pytest.fixture
def two(tmp_path: Path, tiny_model: Path) -> Path:
    file = tmp_path / "two.toml"
    table = f'model = "{tiny_model}"\nctx-size'
    file.write_text(f"port = 8081\n[models.small]\n{table} = 256\n[models.big]\n{table} = 1024\n")
    return file


def test_a_file_of_one_model(start: Start, one: Path, tiny_model: Path) -> None:
    model = ["-m", str(tiny_model)]
    assert start("serve", "--config", one) == ["llama-server", *model, *line("--ctx-size 512 --port 8081")]
    assert start("serve", f"--config={one}", "-c", 64) == ["llama-server", *model, *line("--port 8081 -c 64")]
    assert start("serve", "--config", one, "-hf", "a/b")[1:5] == line("--ctx-size 512 --port 8081")
    assert start("chat", "--config", one) == ["llama-cli", *model, *line("--ctx-size 512 --system-prompt Brief.")]
    answered = start("run", "Hello", "there", "--config", one)
    assert answered == ["answer", *model, *line("--ctx-size 512 --port 8081 --system-prompt Brief."), "Hello there"]


def test_another_model_takes_the_place_of_the_file_s(start: Start, one: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(tiny_model.read_bytes())
    words = line("--ctx-size 512 --port 8081")
    assert start("serve", other, "--config", one) == ["llama-server", "-m", str(other), *words]
    assert start("serve", "-m", other, "--config", one) == ["llama-server", *words, "-m", str(other)]


def test_a_file_of_several_models(
    start: Start, two: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ["-m", str(tiny_model)]
    assert start("serve", "big", "--config", two) == ["llama-server", "--port", "8081", *model, "--ctx-size", "1024"]
    assert start("run", "small", "Hi", "--config", two)[-5:] == [*model, "--ctx-size", "256", "Hi"]
    assert cli.main(["chat", "--config", str(two)]) == 1
    assert "has several models; name one of small, big" in capsys.readouterr().err

    program, *words, flag, path = start("serve", "--config", two)
    assert (program, words, flag) == ("llama-server", ["--port", "8081"], "--models-preset")
    presets = Path(path).read_text()
    assert presets.split("\n")[:3] == ["[small]", f"model = {tiny_model}", "ctx-size = 256"]
    if path.startswith("/proc/self/fd/"):
        fd = int(Path(path).name)
        assert os.get_inheritable(fd)  # the program has to have it
        os.close(fd)
