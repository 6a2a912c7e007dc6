"""The programs that are measured, as data (engines.toml), and what they print."""

from __future__ import annotations

import itertools
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from bench import programs

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Engine:
    name: str
    program: str
    flags: tuple[str, ...]
    about: str = ""

    @property
    def repacks(self) -> bool:
        return ("--repack", "0") not in itertools.pairwise(self.flags)

    @property
    def streams_repacked(self) -> bool:
        return self.repacks and "--dynamic-layers" in self.flags

    def environment(self, model: Path) -> dict[str, str]:
        return os.environ | {"SUPERLLAMA_CACHE": str(cache(model))}

    def file(self, model: Path) -> Path:
        """What its weights are streamed from: the model, or its repacked blocks once they are there."""
        blocks = cache(model).glob("repacked/*.blocks") if self.streams_repacked else ()
        return max(blocks, key=lambda p: p.stat().st_mtime, default=model)

    def command(
        self, model: Path, n_gen: int, n_prompt: int, budget: int | None, threads: int, extra: tuple[str, ...] = (),
        build: Path | None = None,
    ) -> list[str]:  # fmt: skip
        """Without a budget, flags that need one are left out."""
        flags: list[str] = []
        for flag in self.flags:
            if "{budget}" not in flag:
                flags.append(flag)
            elif budget is None:
                flags.pop()
            else:
                flags.append(flag.format(budget=budget))
        found = str(programs.find(self.program, build))
        # no larger context and compute buffers than the run needs: what remains is memory for weights
        n_ctx = -(-(n_gen + n_prompt + 1) // 128) * 128
        sizes = ["-n", str(n_gen), "--n-prompt", str(n_prompt), "-t", str(threads)]
        sizes += ["-c", str(n_ctx), "-ub", str(max(32, min(512, n_prompt)))]
        return [found, "-m", str(model), *sizes, *flags, *extra]


def cache(model: Path) -> Path:
    """The cache folder of runs with this model: on its disk, and with nothing else in it."""
    return model.with_suffix(".cache")


def load() -> dict[str, Engine]:
    data = tomllib.loads(Path(__file__).with_name("engines.toml").read_text())
    return {k: Engine(k, v["program"], tuple(v.get("flags", [])), v.get("about", "")) for k, v in data.items()}


def get(name: str) -> Engine:
    engines = load()
    if name not in engines:
        raise ValueError(f"engine {name!r} is not in engines.toml; it has {', '.join(engines)}")
    return engines[name]


def parse_output(text: str) -> dict | None:
    """The program's JSON: its last line that is an object. None if it died before."""
    for line in reversed(text.splitlines()):
        if line.startswith("{"):
            try:
                return json.loads(line)
            except ValueError:
                return None
    return None
