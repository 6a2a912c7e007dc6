"""Upstream's own tests of states and threads, with paging on and hardly any memory for it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from native_build import native_programs

FLAGS = {
    "test-save-load-state": ["-c", "512", "-t", "2"],
    "test-state-restore-fragmented": ["-t", "2"],
    "test-thread-safety": ["-c", "256", "-np", "4", "-n", "128", "-p", "The meaning of life is", "-t", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [[], ["--async-prefetch", "--prefetch-threads", "2"]], ids=["sync", "async"])
@pytest.mark.parametrize("name", FLAGS)
def test_upstream(name: str, prefetch: list[str], demo_model: Path, tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    command = [native_programs() / name, "-m", demo_model, *FLAGS[name], "--metrics-file", metrics]
    command += ["--paged-kv", "--kv-page-size", "16", "--kv-budget", "3MiB", "--spill-dir", tmp_path, *prefetch]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    final = [line for line in lines if line["event"] == "final"]
    assert any(line["kv_pages_evicted"] > 0 and line["kv_bytes_written"] > 0 for line in final)
    assert any(line["kv_bytes_read"] > 0 for line in final)
