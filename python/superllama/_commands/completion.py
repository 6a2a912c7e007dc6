"""What may follow on a command line, for the shells, which ask here at each TAB (_shells).

Subcommands and flags are those of the parser, and those that --help of a program shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from .._models import found_models
from .._programs import NAME_OPTIONS
from .front_doors import flags_of_door
from .program_flags import Flag, flags_of
from .shells import PROGRAMS

MODEL_FILES = "*.gguf"
ABOUT_LENGTH = 80


@dataclasses.dataclass(frozen=True)
class Offer:
    """Words with what they mean, and a pattern of the names of files; "" = no files."""

    words: Sequence[tuple[str, str]] = ()
    files: str = ""


def answer(parser: argparse.ArgumentParser, words: Sequence[str]) -> str:
    """What a shell is told: a pattern of files, then a word a line with what it means. `words` are those of the command
    line up to the cursor, the last one unfinished, perhaps empty."""
    command, *rest = words if len(words) > 1 else ["superllama", ""]
    program = PROGRAMS.get(Path(command).name)
    offer = _of_program(flags_of(program), rest, program == "llama-quantize") if program else _of_parser(parser, rest)
    fitting = [(word, about) for word, about in offer.words if word.startswith(rest[-1])]
    return "\n".join([offer.files, *(f"{word}\t{_short(about)}" for word, about in fitting)])


def _short(about: str) -> str:
    line = re.sub(r"\s+", " ", about)
    return line if len(line) <= ABOUT_LENGTH else line[: ABOUT_LENGTH - 3] + "..."


def _models() -> Offer:
    return Offer([(found.name, f"{found.bytes / 1e9:.1f} GB") for found in found_models()], MODEL_FILES)


# ---------------------------------------------------------------- our own command


def _of_parser(parser: argparse.ArgumentParser, words: Sequence[str]) -> Offer:
    """What may stand in place of the last word."""
    options = {name: action for action in parser._actions for name in action.option_strings}
    positionals = [action for action in parser._actions if not action.option_strings]
    waiting: argparse.Action | None = None  # for its value
    for i, word in enumerate(words[:-1]):
        if waiting:
            waiting = None
        elif word.startswith("-"):
            action = options.get(word)
            waiting = action if action and action.nargs != 0 else None
        elif positionals and isinstance(positionals[0], argparse._SubParsersAction):
            chosen = positionals[0].choices.get(word)
            return _of_command(chosen, words[i + 1 :]) if chosen else Offer()
        elif positionals and positionals[0].nargs not in ("*", "+"):
            positionals.pop(0)
    name, equals, _ = words[-1].partition("=")
    if equals and name in options:
        return Offer([(f"{name}={value}", about) for value, about in _values(options[name]).words])
    if waiting:
        return _values(waiting)
    if words[-1].startswith("-") or not positionals:
        return Offer([(name, _help(parser, action)) for name, action in options.items()])
    return _values(positionals[0])


def _of_command(parser: argparse.ArgumentParser, words: Sequence[str]) -> Offer:
    """A subcommand's; of one that hands its words to a program, those of the program."""
    door = parser.get_default("door")
    if door is None:
        return _of_parser(parser, words)
    return _of_program(flags_of_door(door), words, names_files=False, names_model=True)


def _values(action: argparse.Action) -> Offer:
    if isinstance(action, argparse._SubParsersAction):
        return Offer([(part.dest, part.help or "") for part in action._choices_actions])
    if action.choices is not None:
        return Offer([(str(choice), "") for choice in action.choices])
    if action.dest in ("model", "model_option"):
        return _models()
    return Offer(files="*" if action.type is Path else "")


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    return parser._get_formatter()._expand_help(action) if action.help else ""


# ---------------------------------------------------------------- the programs of llama.cpp


def _of_program(flags: Iterable[Flag], words: Sequence[str], names_files: bool, names_model: bool = False) -> Offer:
    """What may stand in place of the last word; arguments without a flag are files, or first a model, or nothing."""
    known = {name: flag for flag in flags for name in flag.names}
    waiting, n_waiting = None, 0
    for word in words[:-1]:
        if n_waiting:
            n_waiting -= 1
        elif word in known:
            waiting, n_waiting = known[word], known[word].n_values
        elif not word.startswith("-"):
            names_model = False
    if waiting and n_waiting:
        return _values_of(waiting)
    if words[-1].startswith("-"):
        return Offer([(name, flag.about) for name, flag in known.items()])
    return _models() if names_model else Offer(files="*" if names_files else "")


def _values_of(flag: Flag) -> Offer:
    if not NAME_OPTIONS.isdisjoint(flag.names):
        return _models()
    return Offer([(choice, "") for choice in flag.choices], "*" if flag.names_file else "")
