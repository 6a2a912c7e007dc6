"""Where the programs lie that the bench runs: the build folder, or what --build or SUPERLLAMA_BUILD says."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("tests/native", "bench/native", "bench", "bin", "")
TARGETS = {"probe": "superllama-tests", "probe-stock": "superllama-tests"}


def build_dir(given: Path | None = None) -> Path:
    return given or Path(os.environ.get("SUPERLLAMA_BUILD", ROOT / "build"))


def find(name: str, build: Path | None = None) -> Path:
    folder = build_dir(build)
    for place in PLACES:
        path = folder / place / name
        if path.is_file():
            return path
    target = TARGETS.get(name, "superllama-bench")
    raise FileNotFoundError(
        f"{name} is not in {folder}: build it with 'cmake --build {folder} --target {target}', "
        "or name another build folder with --build or SUPERLLAMA_BUILD"
    )
