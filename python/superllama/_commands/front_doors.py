"""The subcommands run, chat, serve and bench: programs of llama.cpp by what people want of them, with the same flags.

    superllama run MODEL "prompt"       an answer; without a prompt, a chat
    superllama serve MODEL -c 8192      what superllama-server -m MODEL -c 8192 is

A model has the names that -m takes, and hf:org/repo:quant is fetched. What is not said here goes to the program.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import itertools
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._errors import Error

if TYPE_CHECKING:
    from .program_flags import Flag
    from .settings import Settings

HELP = {"-h", "--help", "--usage"}
CONFIG = "--config"


@dataclasses.dataclass(frozen=True)
class Door:
    """A subcommand: the program, what it is for, what stands behind the model."""

    program: str
    about: str
    text: str = ""
    settings: bool = True  # whether it reads a file of them


DOORS = {
    "run": Door("llama-cli", "answer a prompt; without one, chat", text=" [PROMPT]"),
    "chat": Door("llama-cli", "chat in the terminal"),
    "serve": Door("llama-server", "a chat page and the OpenAI API, of one model or several"),
    "bench": Door("llama-bench", "measure how fast a model is", settings=False),
}


def add_to(commands: Any) -> None:
    """Put them among the subcommands: each takes all that follows, flags too."""
    for name, door in DOORS.items():
        command: argparse.ArgumentParser = commands.add_parser(name, help=door.about, prefix_chars="\0", add_help=False)
        command.add_argument("words", nargs="*")
        command.set_defaults(door=name)


def flags_of_door(name: str) -> list[Flag]:
    """What may stand on its command line. An answer of `run`, and a file of settings, know the server's flags too."""
    from .program_flags import Flag, flags_of

    door = DOORS[name]
    config = Flag((CONFIG,), "FILE", "settings in TOML: flags by their long names, models in tables")
    return [config][: door.settings] + flags_of(door.program) + (flags_of("llama-server") if name == "run" else [])


# ---------------------------------------------------------------- go in


@dataclasses.dataclass
class Line:
    """A command line, sorted: a model, a prompt and a file of settings where there are some; flags and their values."""

    model: str | None
    prompt: str
    settings: Settings | None
    flags: list[str]


def enter(name: str, words: Sequence[str]) -> int:
    """Do it: become the program, or print an answer. Raises: Error for words that mean nothing."""
    from .._programs import model_words, run_with_model, separated

    door = DOORS[name]
    if HELP.intersection(words):
        print(_usage(name), flush=True)
        run_with_model(door.program, ["--help"])
    known = {n: flag for flag in flags_of_door(name) for n in flag.names}
    line = _sorted(name, separated(words), known)
    if name == "run" and not line.prompt and not sys.stdin.isatty():
        line.prompt = _prompt_of_stdin()
    if line.settings is not None:
        _add_settings(name, line, line.settings, known)
    arguments = [*(model_words(line.model) if line.model else ()), *line.flags]
    if not line.prompt:
        run_with_model(door.program, arguments, reads_environment=name != "bench")
    from .run import answer

    answer(arguments, line.prompt)
    return 0


def _usage(name: str) -> str:
    door = DOORS[name]
    words = f"superllama {name} [MODEL]{door.text}{' [--config FILE]' * door.settings} [FLAG...]"
    about = (
        "MODEL is a file, ollama:NAME, lmstudio:NAME, huggingface:NAME, hf:ORG/REPO[:QUANT]; default: the demo model"
    )
    if door.settings:
        about += (
            "\nFILE has flags by their long names, in TOML; of several models, [models.NAME] each, MODEL is the NAME"
        )
    return f"usage: {words}\n\n{door.about}\n\n{about}\n\nFLAG is one of the program's:\n"


def _sorted(name: str, words: Sequence[str], known: Mapping[str, Flag]) -> Line:
    from .._programs import MODEL_OPTIONS

    texts: list[str] = []
    flags: list[str] = []
    settings = None
    rest = iter(_in_parts(words, known))
    for word in rest:
        if word == CONFIG and CONFIG in known:
            settings = _settings(name, next(rest, None))
        elif word in known:
            flags += [word, *itertools.islice(rest, known[word].n_values)]
        elif re.match(r"--?[a-zA-Z]", word):
            close = difflib.get_close_matches(word, known, n=1)
            raise Error(f"superllama {name}: there is no flag {word}{f'; did you mean {close[0]}?' if close else ''}")
        else:
            texts.append(word)
    has_model = bool(MODEL_OPTIONS.intersection(flags))
    if name == "run" and settings is not None:  # all that is no flag is the prompt
        has_model = has_model or any(setting.is_one_of(MODEL_OPTIONS) for setting in settings.top)
    model = texts.pop(0) if texts and not has_model else None
    if texts and not DOORS[name].text:
        raise Error(f"superllama {name}: {texts[0]!r} is neither the model nor a flag; one model, then flags")
    return Line(model, " ".join(texts), settings, flags)


def _in_parts(words: Sequence[str], known: Mapping[str, Flag]) -> Iterator[str]:
    """The words with `--flag=VALUE` as two, and - for _ in names, as llama.cpp has them."""
    for word in words:
        flag, equals, value = word.partition("=")
        flag = flag.replace("_", "-") if flag.startswith("--") else flag
        yield from ([flag, value] if equals else [flag]) if flag in known else [word]


def _prompt_of_stdin() -> str:
    prompt = sys.stdin.read().strip()
    if not prompt:
        raise Error('superllama run: there is no prompt, and nothing on stdin; superllama run MODEL "prompt"')
    return prompt


# ---------------------------------------------------------------- with a file of settings


def _settings(name: str, path: str | None) -> Settings:
    from .program_flags import flags_of
    from .settings import read

    if path is None:
        raise Error(f"superllama {name}: {CONFIG} names a file, such as settings.toml")
    return read(Path(path), [flag for program in ("llama-server", "llama-cli") for flag in flags_of(program)])


def _add_settings(name: str, line: Line, settings: Settings, known: Mapping[str, Flag]) -> None:
    """Put those of the file before the flags, with its model where the command line has none."""
    from .._programs import MODEL_OPTIONS
    from .program_flags import flags_of
    from .settings import command_line, for_router

    taken = {n for word in line.flags if word in known for n in known[word].names}
    program = "llama-server" if line.prompt else DOORS[name].program
    takes = {n for flag in flags_of(program) for n in flag.names}
    if line.prompt:
        from .run import SYSTEM_FLAGS  # brings the engine with it, which only an answer needs

        takes |= SYSTEM_FLAGS

    found = settings.top
    if line.model is not None and line.model in settings.models:
        found = settings.of_model(line.model)
        line.model = None
    elif line.model or MODEL_OPTIONS.intersection(line.flags):
        taken |= MODEL_OPTIONS
    elif settings.models and name != "serve":
        raise Error(f"superllama {name}: {settings.path} has several models; name one of {', '.join(settings.models)}")
    elif settings.models:
        found, presets = for_router(settings, taken)
        line.flags = ["--models-preset", _kept(presets), *line.flags]
    line.flags = [*command_line(found, takes, taken), *line.flags]


def _kept(text: str) -> str:
    """The path of a file that the program which this process becomes can read, and that is gone when it ends."""
    if sys.platform == "linux":
        fd = os.memfd_create("models.ini", 0)
        path = f"/proc/self/fd/{fd}"
    else:
        import tempfile

        fd, path = tempfile.mkstemp(".ini")
    with os.fdopen(fd, "w", closefd=False) as file:
        file.write(text)
    return path
