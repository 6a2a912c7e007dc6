"""A matrix of runs from a TOML file: every model x scenario x swappiness x read-ahead x engine, some times over."""

from __future__ import annotations

import itertools
import sys
from dataclasses import dataclass, field
from pathlib import Path

from bench.job import HEADROOM, Job, scenario_bytes
from bench.make_model import Spec, make_model
from bench.sizes import format_size, parse_size

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class ModelEntry:
    name: str
    path: Path | None = None
    make: dict = field(default_factory=dict)  # kind, size, n_expert, ...: made where there is none

    def file(self, folder: Path) -> Path:
        return self.path or folder / f"{self.name}.gguf"


@dataclass(frozen=True)
class Matrix:
    models: list[ModelEntry]
    scenarios: list[str]
    engines: list[str]
    swappiness: list[int | None]
    read_ahead_kb: list[int | None]
    repeats: int = 3
    tokens: int = 20
    prompt_tokens: int = 16
    threads: int = 2
    pressure: str = "auto"
    block_tracer: str = "auto"
    headroom: int = HEADROOM

    def jobs(self, folder: Path) -> list[Job]:
        """Repeat by repeat, every second one backwards: a drift of the machine does not favour what comes first."""
        configurations = list(
            itertools.product(self.models, self.scenarios, self.swappiness, self.read_ahead_kb, self.engines)
        )
        out = []
        for repeat in range(self.repeats):
            for model, scenario, swap, ahead, name in configurations if repeat % 2 == 0 else reversed(configurations):
                out.append(Job(str(model.file(folder)), scenario, name, self.tokens, self.prompt_tokens, swap, ahead,
                               self.threads, (), self.pressure, self.block_tracer, self.headroom, repeat))  # fmt: skip
        return out


def load(path: Path) -> Matrix:
    data = tomllib.loads(path.read_text())
    models = []
    for entry in data.pop("model", []):
        file = Path(entry["path"]).expanduser() if "path" in entry else None
        models.append(ModelEntry(entry.get("name") or (file.stem if file else "model"), file, entry.get("make", {})))
    if not models:
        raise ValueError(f"{path} names no [[model]]; give at least one with a path, or with what to make")
    unknown = set(data) - set(Matrix.__dataclass_fields__)
    if unknown:
        known = ", ".join(sorted(set(Matrix.__dataclass_fields__) - {"models"}))
        raise ValueError(f"{path}: unknown {', '.join(sorted(unknown))}; known are {known}")
    for name in ("scenarios", "engines"):
        if not data.get(name):
            raise ValueError(f"{path} has no {name}, for example {name} = ['baseline']")
    for name in ("swappiness", "read_ahead_kb"):
        data[name] = [None if v == "as-found" else int(v) for v in data.get(name, ["as-found"])]
    if "headroom" in data:
        data["headroom"] = parse_size(str(data["headroom"]))
    for scenario in data["scenarios"]:
        scenario_bytes(scenario, 1)
    return Matrix(models=models, **data)


def make_models(matrix: Matrix, folder: Path, vocab: Path | None) -> list[Path]:
    """Files of all models; those that the matrix describes and that are not there are made."""
    files = []
    for entry in matrix.models:
        file = entry.file(folder)
        if not file.is_file():
            if not entry.make:
                raise FileNotFoundError(f"model {entry.name}: {file} does not exist; correct its path in the matrix")
            if vocab is None:
                raise FileNotFoundError(f"model {entry.name} must be made: give --vocab, a GGUF with a vocabulary")
            wanted = dict(entry.make)
            wanted["size"] = parse_size(str(wanted["size"]))
            folder.mkdir(parents=True, exist_ok=True)
            made = make_model(file, vocab, Spec(**wanted))
            print(f"made {file}: {format_size(file.stat().st_size)}, {made.n_layer} layers")
        files.append(file)
    return files
