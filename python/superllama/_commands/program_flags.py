"""The flags of a program of llama.cpp, as its --help has them: what completion offers, and a file of settings may hold.

Nothing here has a list of its own, so none can be out of date.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
from collections.abc import Sequence

from .._programs import find_program, program_environment

_NAME = r"-{1,2}[a-zA-Z][\w.-]*"
# a line that begins a flag: names, what its value is called, and behind two spaces what it does
_HEAD = re.compile(rf" {{0,2}}(?P<names>{_NAME}(?:,? +{_NAME})*)(?: (?P<value>\S+(?: \S+)*))?(?: {{2,}}(?P<about>.*))?")
_WORDS = r"[\w+.-]+"
_ALLOWED = re.compile(rf"allowed values: ({_WORDS}(?:, {_WORDS})*)")
_LISTED = re.compile(rf" - ({_WORDS}): ")  # a value a line
_FILE_WORDS = ("FNAME", "FILE", "PATH", "filename", "file_name", ".txt", "_FILE")


@dataclasses.dataclass(frozen=True)
class Flag:
    """One flag: all its names, what --help calls its value ("" for a switch), what it does, its variables."""

    names: tuple[str, ...]
    value: str
    about: str
    variables: tuple[str, ...] = ()

    @property
    def choices(self) -> list[str]:
        """The values that it may have, where --help lists them."""
        inner = self.value.strip("[]<>{}")
        if re.fullmatch(rf"{_WORDS}(\|{_WORDS})+", inner):
            return inner.split("|")
        braces = self.value.startswith("{") or re.fullmatch(r"[a-z][\w-]*(,[a-z][\w-]*){3,}", inner)
        if braces and re.fullmatch(rf"{_WORDS}(,{_WORDS})+", inner):
            return inner.split(",")
        if self.value and (found := _ALLOWED.search(self.about)):
            return found[1].split(", ")
        return _LISTED.findall(self.about) if self.value else []

    @property
    def names_file(self) -> bool:
        """Whether its value is a file or a folder."""
        return any(word in self.value for word in _FILE_WORDS)

    @property
    def n_values(self) -> int:
        """How many words of a command line its value is."""
        return 2 if re.fullmatch(r"[A-Z]+ [A-Z]+", self.value) else int(bool(self.value))


@functools.cache
def flags_of(program: str) -> list[Flag]:
    """What the program takes. Ends the process with a message if it is not there."""
    path = find_program(program)
    command, environment = [str(path), "--help"], program_environment(path, os.environ)
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=environment)
    return parsed(done.stdout + done.stderr)


def parsed(text: str) -> list[Flag]:
    """The flags in the text of a --help."""
    found: list[tuple[str, str, list[str]]] = []
    for line in text.splitlines():
        if head := _HEAD.fullmatch(line):
            found.append((head["names"], head["value"] or "", [head["about"] or ""]))
        elif found and line.startswith("    "):
            found[-1][2].append(line.strip())
        elif found:
            found[-1][2].append("\n")  # a title: what follows belongs to no flag
    return [_flag(*one) for one in found]


def _flag(names: str, value: str, lines: Sequence[str]) -> Flag:
    about = " ".join(lines).partition("\n")[0].strip()
    value, _, default = value.partition(" (default")  # where a name leaves no room for two spaces
    variables = re.search(r"\(env: ([\w, ]+)\)", about)
    about = re.sub(r"\s*\(env: [\w, ]+\)", "", f"(default{default} {about}" if default else about)
    return Flag(
        tuple(re.split(r",? +", names)), value, about, tuple(re.split(", *", variables[1])) if variables else ()
    )
