"""Random schedules over the paged KV cache, compared with the standard one bit for bit."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from native_build import native_programs

BUDGET_PAGES = {16: 30, 256: 5, 1024: 2}


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize(("page", "threads", "prefetch"), [(16, 1, 1), (256, 4, 0), (256, 1, 1), (1024, 4, 1)])
def test_schedule(demo_model: Path, page: int, threads: int, prefetch: int, kind: str, tmp_path: Path) -> None:
    command = [native_programs() / "kv-schedule", "-m", demo_model, "--steps", 60, "--page", page, "--type", kind]
    command += [
        "--threads",
        threads,
        "--async",
        prefetch,
        "--budget-pages",
        BUDGET_PAGES[page],
        "--spill-dir",
        tmp_path,
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] == 60
    assert report["evicted_dirty"] > 0
    assert report["restored"] > 0
    assert not list(tmp_path.iterdir())  # the spill file has no name
