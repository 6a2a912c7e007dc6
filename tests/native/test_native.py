"""Runs the C++ tests: plain, under AddressSanitizer and UndefinedBehaviorSanitizer, and under ThreadSanitizer."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from native_build import native_programs

UNITS = ["size", "telemetry", "prefetch", "metrics", "kv-spill", "kv-pages"]


@pytest.mark.parametrize("variant", ["", "-asan", "-tsan"])
@pytest.mark.parametrize("unit", UNITS)
def test_unit(unit: str, variant: str, tmp_path: Path) -> None:
    program = native_programs() / f"test-{unit}{variant}"
    done = subprocess.run([program, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("ok")


@pytest.mark.parametrize(("seed", "repack", "sync"), [(1, 1, 0), (2, 0, 0), (3, 0, 1)])
def test_random_budgets_and_cancellations_change_no_logit(seed: int, repack: int, sync: int, demo_model: Path) -> None:
    """The program compares every step with stock and fails unless blocks were evicted and read again."""
    arguments = [str(demo_model), "120", str(seed), str(repack), str(sync)]
    done = subprocess.run(
        [native_programs() / "stress-layers", *arguments], capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["steps"] == 120
    assert report["cancelled"] > 0
