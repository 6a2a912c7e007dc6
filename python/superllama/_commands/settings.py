"""A file of settings in TOML, for `superllama serve`, `run` and `chat`: flags by their long names, and models by name.

    model = "ollama:llama3.2:3b"        # as for -m; hf:org/repo:quant is fetched
    mem-budget = "8GiB"
    port = 8080                         # what a program does not know, but another one does, is passed over

    [models.small]                      # several: `serve` offers all, `run small` takes this one
    model = "small.gguf"
    ctx-size = 4096                     # in place of what stands above

The command line comes before environment variables, and both before the file.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .._errors import Error
from .._models import by_name
from .._programs import MODEL_OPTIONS, PRINT_OPTIONS, model_words, opposite
from .program_flags import Flag

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MODELS = "models"  # the table of tables
# keys that only upstream's router knows, which reads them from its file of presets
ROUTER_KEYS = (Flag(("--load-on-startup",), "", ""), Flag(("--stop-timeout",), "N", ""))
_NAME = re.compile(r"[\w./-]+")  # what its file of presets takes as it is


@dataclasses.dataclass(frozen=True)
class Setting:
    """A key with its value: as words of a command line, and as the router's file of presets has it."""

    flag: Flag
    words: Sequence[str]
    key: str
    text: str

    def is_one_of(self, names: Iterable[str]) -> bool:
        """Whether it is the flag of one of these names."""
        return not set(self.flag.names).isdisjoint(names)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a file says: for all, and for each model that it names."""

    path: Path
    top: Sequence[Setting]
    models: Mapping[str, Sequence[Setting]]

    def of_model(self, name: str) -> list[Setting]:
        """Those of one of its models, over those for all."""
        own = self.models[name]
        return [s for s in self.top if not any(s.is_one_of(o.flag.names) for o in own)] + list(own)


# ---------------------------------------------------------------- read


def read(path: Path, flags: Iterable[Flag]) -> Settings:
    """The settings of a file. `flags` are those that some program knows.

    Raises: Error that names the line and the key; OSError where the file cannot be read.
    """
    text = path.read_text(encoding="utf-8")
    try:
        top = tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        raise Error(f"{path}: {e}") from e
    models = top.pop(MODELS, {})
    reader = _Reader(path, text, flags)
    if not isinstance(models, dict) or not all(isinstance(table, dict) for table in models.values()):
        raise reader.error((), MODELS, f"is for tables: [{MODELS}.NAME]")
    for name in models:
        if not _NAME.fullmatch(name):
            raise reader.error((MODELS, name), "", "a name has letters, digits and . _ - / only")
    tables = {name: reader.settings((MODELS, name), table) for name, table in models.items()}
    for name, table in tables.items():
        if not any(setting.is_one_of(MODEL_OPTIONS) for setting in table):
            raise reader.error((MODELS, name), "", 'names no model: model = "FILE"')
    found = reader.settings((), top)
    if tables and (own := next((s for s in found if s.is_one_of(MODEL_OPTIONS)), None)):
        raise reader.error((), own.key, f"names a model, and so do tables [{MODELS}.NAME]; leave out one of them")
    return Settings(path, found, tables)


class _Reader:
    """The tables of one file, with where they are in it."""

    def __init__(self, path: Path, text: str, flags: Iterable[Flag]) -> None:
        self.path = path
        self.text = text
        self.flags = {name: flag for flag in flags for name in flag.names if not PRINT_OPTIONS.intersection(flag.names)}
        self.router_flags = {name: flag for flag in ROUTER_KEYS for name in flag.names}

    def settings(self, table: tuple[str, ...], values: Mapping[str, Any]) -> list[Setting]:
        found: dict[tuple[str, ...], Setting] = {}
        for key, value in values.items():
            setting = self._setting(table, key, value)
            if (other := found.get(setting.flag.names)) is not None:
                raise self.error(table, key, f"is the same as {other.key}; leave out one of them")
            found[setting.flag.names] = setting
        return list(found.values())

    def _setting(self, table: tuple[str, ...], key: str, value: Any) -> Setting:
        known = self.flags | (self.router_flags if table else {})
        name = "--" + key.replace("_", "-")
        flag = known.get(name)
        if flag is None and (isinstance(value, dict) or name in self.router_flags):
            raise self.error(table, key, f"is not known here; tables are [{MODELS}.NAME], for one model each")
        if flag is None:
            raise self.error(table, key, f"is no flag of llama.cpp{_hint(key, known)}")
        try:
            if name == "--model":
                return _model(flag, value)
            words = _words(name, flag, value)
        except ValueError as e:
            raise self.error(table, key, str(e)) from e
        return Setting(flag, words, name[2:], ",".join(words[1:]) if flag.n_values else str(value).lower())

    def error(self, table: tuple[str, ...], key: str, why: str) -> Error:
        line = _line(self.text, table, key)
        where = f", line {line}" if line else f", in [{'.'.join(table)}]" if table else ""
        return Error(f"{self.path}{where}: {key}{' ' * bool(key)}{why}")


def _hint(key: str, known: Mapping[str, Flag]) -> str:
    if (short := known.get(f"-{key}")) is not None:
        close = [name for name in short.names if name.startswith("--")]
    else:
        close = difflib.get_close_matches("--" + key.replace("_", "-"), [n for n in known if n.startswith("--")], n=1)
    return f"; did you mean {close[0][2:]}?" if close else ""


def _line(text: str, table: tuple[str, ...], key: str) -> int | None:
    """Where a key stands, or the head of its table; None where it is written in another way."""
    inside: tuple[str, ...] = ()
    wanted = re.compile(rf"""\s*["']?{re.escape(key)}["']?\s*=""")
    for number, line in enumerate(text.splitlines(), 1):
        if head := re.fullmatch(r"\s*\[([^\[\]]+)\]\s*(#.*)?", line):
            inside = tuple(part.strip("\"'") for part in re.findall(r""""[^"]*"|'[^']*'|[^.\s"']+""", head[1]))
            if inside == table and not key:
                return number
        elif inside == table and key and wanted.match(line):
            return number
    return None


# ---------------------------------------------------------------- a value as words


def _words(name: str, flag: Flag, value: Any) -> list[str]:
    """The words of a command line. Raises: ValueError for a value of another kind."""
    if flag.n_values == 0:
        if not isinstance(value, bool):
            raise ValueError(f"is a switch, true or false, not {value!r}")
        other = opposite(name)
        return [name] if value else [other] if other in flag.names else []  # what has no opposite is off
    if isinstance(value, bool) and {"on", "off"}.issubset(flag.choices):
        value = "on" if value else "off"
    if isinstance(value, list):
        return [name, *_of_list(flag, value)]
    if flag.n_values > 1:
        raise ValueError(f"takes {flag.n_values} values, [{flag.value.replace(' ', ', ')}]")
    return [name, _word(flag, value)]


def _of_list(flag: Flag, values: list[Any]) -> list[str]:
    words = [_word(flag, value) for value in values]
    if flag.n_values == len(words) > 1:
        return words
    if "comma-separated" not in flag.about and ("," not in flag.value or flag.choices):
        raise ValueError("takes one value, not a list")
    return [",".join(words)]


def _word(flag: Flag, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        given = str(value).lower() if isinstance(value, bool) else repr(value)
        raise ValueError(f"takes a value ({' | '.join(flag.choices) or flag.value}), not {given}")
    return str(value)


def _model(flag: Flag, value: Any) -> Setting:
    words = model_words(_word(flag, value))
    key = {"-hf": "hf-repo", "-m": "model"}[words[0]]
    return Setting(flag, words, key, str(by_name(words[1])) if key == "model" else words[1])


# ---------------------------------------------------------------- for the programs


def command_line(settings: Iterable[Setting], known: set[str], taken: set[str]) -> list[str]:
    """The words for a program that knows these flags, without those that the command line or the environment takes."""
    wanted = [s for s in settings if s.words and s.words[0] in known and not _is_taken(s, taken)]
    return [word for setting in wanted for word in setting.words]


def _is_taken(setting: Setting, taken: set[str]) -> bool:
    return setting.is_one_of(taken) or any(os.environ.get(name) for name in setting.flag.variables)


def for_router(settings: Settings, taken: set[str]) -> tuple[list[Setting], str]:
    """What a server of several models gets: settings of its command line, which hold for all models whatever the file
    of presets says, and that file. So what one model has in another way stands there, for each of them.

    Raises: Error for what such a file cannot hold.
    """
    own = {name for table in settings.models.values() for setting in table for name in setting.flag.names}
    sections = []
    for name in settings.models:
        there = [s for s in settings.of_model(name) if s.is_one_of(own) and not _is_taken(s, taken)]
        for setting in there:
            _check_preset(settings.path, name, setting)
        sections.append("\n".join([f"[{name}]", *(f"{s.key} = {s.text}" for s in there), ""]))
    return [s for s in settings.top if not s.is_one_of(own)], "\n".join(sections)


def _check_preset(path: Path, name: str, setting: Setting) -> None:
    where = f"{path}, in [{MODELS}.{name}]: {setting.key}"
    if setting.flag.n_values > 1:
        raise Error(f"{where} takes two values, which the server of several models has no way to pass on")
    if re.search(r"[;#\r\n]|^\s|\s$", setting.text):
        raise Error(f"{where} has a ; or a #, a line break, or a space at an end; llama.cpp's presets cannot hold that")
