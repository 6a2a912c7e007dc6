"""A results folder made by hand, and a build folder whose programs are short scripts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from bench.trace import mapping, table, tensors

ROOT = Path(__file__).resolve().parents[2]


def needs_program(_name: str):
    """The native programs are built first (the fixture `native` of conftest.py)."""
    return pytest.mark.usefixtures("native")


def needs_root():
    return pytest.mark.skipif(os.geteuid() != 0, reason="needs root: changes kernel settings and makes cgroups")


def write_run(results: Path, key: str, block: pa.Table | None = None, **what) -> None:
    folder = results / "runs" / key
    folder.mkdir(parents=True)
    run = {"key": key, "model": "m.gguf", "engine": "stock", "scenario": "baseline", "swappiness": None,
           "read_ahead_kb": None, "threads": 2, "tokens": 4, "repeat": 0, "status": "ok", "error": "",
           "model_bytes": 1000, "budget_bytes": None, "wall_s": 1.0, "decode_tokens_per_s": 4.0}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(run | what))
    if block is not None:
        table.save(block, folder / "block.parquet")


def write_model(results: Path, where: tensors.TensorMap, name: str = "m") -> None:
    (results / "models").mkdir(parents=True, exist_ok=True)
    table.save(mapping.ranges_table(where), results / "models" / f"{name}.parquet")


FAKE = """#!{python}
import json, os, sys, time
with open({log!r}, "a") as out:
    out.write(" ".join(sys.argv) + chr(10))
time.sleep({sleep})
with open(sys.argv[sys.argv.index("-m") + 1], "rb") as f:
    while f.read(1 << 20):
        pass
print(json.dumps(dict(hash="0", tokens=[1], n_prompt=4, load_s=0.1, prompt_s=0.1, decode_s=0.05)))
"""


def fake_build(folder: Path, sleep: float = 0.0) -> tuple[Path, Path]:
    """A build folder whose probes read the model's file and print a result; and the log of their calls."""
    log = folder / "calls.log"
    folder.mkdir(exist_ok=True)
    log.touch()
    for name in ("probe", "probe-stock"):
        program = folder / "tests/native" / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(FAKE.format(python=sys.executable, log=str(log), sleep=sleep))
        program.chmod(0o755)
    return folder, log
