"""A file of settings becomes words of a command line; what means nothing there is an error with its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import superllama
from superllama._commands.program_flags import Flag
from superllama._commands.settings import Settings, command_line, for_router, read

FLAGS = [
    Flag(("-h", "--help"), "", "print usage and exit"),
    Flag(("-c", "--ctx-size"), "N", "size of the context", ("TEST_CTX_SIZE",)),
    Flag(("--mem-budget",), "SIZE", "hard cap"),
    Flag(("--jinja", "--no-jinja"), "", "a template engine"),
    Flag(("--no-host",), "", "without"),
    Flag(("-fa", "--flash-attn"), "[on|off|auto]", "attention"),
    Flag(("--lora",), "FNAME", "adapters, comma-separated"),
    Flag(("--tensor-split",), "N0,N1,...", "shares"),
    Flag(("--layer-range",), "START END", "layers"),
    Flag(("-a", "--alias"), "STRING", "names, comma-separated"),
    Flag(("--port",), "PORT", "to listen on"),
    Flag(("-m", "--model"), "FNAME", "path"),
    Flag(("-hf", "--hf-repo"), "<user>/<model>[:quant]", "repository"),
]
KNOWN = {name for flag in FLAGS for name in flag.names}
Read = Callable[[str], Settings]


def words_of(text: str) -> list[str]:
    """The words of a command line."""
    return text.split()


@pytest.fixture
def settings(tmp_path: Path) -> Read:
    def read_text(text: str) -> Settings:
        (tmp_path / "s.toml").write_text(text)
        return read(tmp_path / "s.toml", FLAGS)

    return read_text


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ctx-size = 4096", "--ctx-size 4096"),
        ("ctx_size = 4096", "--ctx-size 4096"),
        ('mem-budget = "8GiB"', "--mem-budget 8GiB"),
        ("jinja = true", "--jinja"),
        ("jinja = false", "--no-jinja"),
        ("no-jinja = true", "--no-jinja"),
        ("no-jinja = false", "--jinja"),
        ("no-host = false", ""),
        ("flash-attn = true", "--flash-attn on"),
        ('flash-attn = "auto"', "--flash-attn auto"),
        ('lora = ["a.gguf", "b.gguf"]', "--lora a.gguf,b.gguf"),
        ("tensor-split = [3, 1]", "--tensor-split 3,1"),
        ("layer-range = [1, 5]", "--layer-range 1 5"),
        ('model = "x.gguf"', "-m x.gguf"),
        ('model = "hf:org/repo:Q8_0"', "-hf org/repo:Q8_0"),
    ],
)
def test_a_value_is_words(settings: Read, line: str, words: str) -> None:
    assert command_line(settings(line).top, KNOWN | {"-m", "-hf"}, set()) == words_of(words)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('\nmem-bugdet = "8GiB"', "line 2: mem-bugdet is no flag of llama.cpp; did you mean mem-budget?"),
        ("c = 1", "line 1: c is no flag of llama.cpp; did you mean ctx-size?"),
        ("help = true", "line 1: help is no flag"),
        ("jinja = 3", "line 1: jinja is a switch, true or false, not 3"),
        ("ctx-size = true", r"line 1: ctx-size takes a value \(N\), not true"),
        ("flash-attn = {}", r"flash-attn takes a value \(on \| off \| auto\), not {}"),
        ("flash-attn = 2026-01-01", r"takes a value \(on \| off \| auto\), not datetime"),
        ("ctx-size = [1, 2]", "takes one value, not a list"),
        ("layer-range = 4", r"takes 2 values, \[START, END\]"),
        ("ctx-size = 1\nctx_size = 2", "line 2: ctx_size is the same as ctx-size"),
        ("jinja = true\nno-jinja = true", "line 2: no-jinja is the same as jinja"),
        ("x = ]", "line 1, column"),
        ("load-on-startup = true", r"tables are \[models.NAME\]"),
        ("[server]\nport = 1", r"server is not known here; tables are \[models.NAME\]"),
        ("models = 3", r"models is for tables: \[models.NAME\]"),
        ('[models.a]\nmodel = "x"\nctx-sise = 3', "line 3: ctx-sise .* ctx-size"),
        ('[models."a b"]\nmodel = "x"', "line 1: a name has"),
        ("# x\n[models.a] # y\nctx-size = 3", 'line 2: names no model: model = "FILE"'),
        ('model = "x"\n[models.a]\nmodel = "y"', "line 1: model names a model, and so do tables"),
        ("models.a.ctx-sise = 1", r"in \[models.a\]: ctx-sise"),
    ],
)
def test_what_means_nothing_is_an_error_with_its_place(settings: Read, text: str, why: str) -> None:
    with pytest.raises(superllama.Error, match=rf"s\.toml.*{why}"):
        settings(text)


def test_the_command_line_comes_first_then_the_environment(settings: Read, monkeypatch: pytest.MonkeyPatch) -> None:
    top = settings("ctx-size = 1\njinja = true\nport = 80").top
    assert command_line(top, KNOWN, {"-c", "--ctx-size"}) == ["--jinja", "--port", "80"]
    monkeypatch.setenv("TEST_CTX_SIZE", "2")
    assert command_line(top, KNOWN, {"--jinja", "--no-jinja"}) == ["--port", "80"]


def test_a_flag_of_another_program_is_passed_over(settings: Read) -> None:
    assert command_line(settings("port = 80\nctx-size = 1").top, {"-c", "--ctx-size"}, set()) == ["--ctx-size", "1"]


TWO = """
port = 80
ctx-size = 1024
jinja = false

[models.small]
model = "a.gguf"
ctx-size = 512
alias = ["tiny", "little"]
load-on-startup = true

[models."org/big"]
model = "hf:org/big:Q8_0"
no-jinja = false
"""


def test_a_model_has_its_own_settings_over_those_of_all(settings: Read) -> None:
    found = settings(TWO)
    words = command_line(found.of_model("small"), KNOWN, set())
    assert words == words_of("--port 80 --no-jinja -m a.gguf --ctx-size 512 --alias tiny,little")
    assert command_line(found.of_model("org/big"), KNOWN, {"--port"}) == words_of(
        "--ctx-size 1024 -hf org/big:Q8_0 --jinja"
    )


def test_several_models_are_presets_of_the_router(settings: Read) -> None:
    """What the router's command line says holds for every model: so it has only what none has in another way."""
    top, presets = for_router(settings(TWO), set())
    assert command_line(top, KNOWN, set()) == ["--port", "80"]
    assert presets.split("\n") == [
        "[small]",
        "jinja = false",
        "model = a.gguf",
        "ctx-size = 512",
        "alias = tiny,little",
        "load-on-startup = true",
        "",
        "[org/big]",
        "ctx-size = 1024",
        "hf-repo = org/big:Q8_0",
        "no-jinja = false",
        "",
    ]
    _, presets = for_router(settings(TWO), {"-c", "--ctx-size"})
    assert "ctx-size" not in presets


@pytest.mark.parametrize(
    "line", ['alias = "a;b"', 'alias = "a#b"', 'alias = "a\\nb"', 'alias = " a"', "layer-range = [1, 2]"]
)
def test_what_presets_cannot_hold(settings: Read, line: str) -> None:
    found = settings(f'[models.a]\nmodel = "x"\n{line}')
    with pytest.raises(superllama.Error, match=r"in \[models.a\]: (alias|layer-range)"):
        for_router(found, set())


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.toml", FLAGS)
