"""Random schedules over the paged KV cache, compared with the standard one bit for bit."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from native_build import native_programs
from rpc_devices import rpc_server

BUDGET_PAGES = {16: 30, 256: 5, 1024: 2}


def run(model: Path, folder: Path, **options: object) -> Any:
    command: list[object] = [native_programs() / "kv-schedule", "-m", model, "--spill-dir", folder]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", value]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["evicted_dirty"] > 0
    assert report["restored"] > 0
    assert not list(folder.iterdir())  # the spill file has no name
    return report


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize(("page", "threads", "prefetch"), [(16, 1, 1), (256, 4, 0), (256, 1, 1), (1024, 4, 1)])
def test_schedule(demo_model: Path, page: int, threads: int, prefetch: int, kind: str, tmp_path: Path) -> None:
    options = {"page": page, "threads": threads, "async": prefetch, "budget_pages": BUDGET_PAGES[page], "type": kind}
    assert run(demo_model, tmp_path, steps=60, **options)["steps"] == 60


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
@pytest.mark.parametrize(("page", "budget"), [(17, 40), (100, 8), (1000, 3)])
def test_any_page_size_fits_any_row(demo_model: Path, page: int, budget: int, kind: str, tmp_path: Path) -> None:
    """Pages whose ends lie within a page of the system, which neighbours then share."""
    options = {"page": page, "threads": 2, "budget_pages": budget, "type": kind, "poison": 0}
    assert run(demo_model, tmp_path, steps=60, **options)["resident_rss_bytes"] > 0


@pytest.mark.parametrize("prefetch", [0, 1])
def test_full_disk_and_a_batch_that_is_too_large(demo_model: Path, prefetch: int, tmp_path: Path) -> None:
    options = {"ctx": 512, "page": 16, "budget_pages": 2.5, "async": prefetch, "steps": 10, "seqs": 8}
    run(demo_model, tmp_path, **options, large_batch=1, full_disk=1)


# window and full attention, attention and recurrence, a latent cache; none of them says no to a part of it
COMPOSITES = ["gemma3-dense", "gpt-oss-moe", "granitehybrid-dense", "falcon-h1-dense", "qwen3next-moe", "deepseek2-moe"]


@pytest.mark.parametrize("family", COMPOSITES)
def test_parts_of_composite_caches(family: str, architectures: dict[str, Path], tmp_path: Path) -> None:
    run(architectures[family], tmp_path, steps=200, page=16, budget_pages=66, together=0, full_disk=1)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("demo", {"page": 64, "budget_pages": 18}),
        ("demo", {"page": 16, "budget_pages": 100, "unified": 1, "ctx": 3000, "seed": 7}),
        ("demo", {"page": 17, "budget_pages": 64, "type": "q8_0", "async": 1, "poison": 0, "seed": 5}),
        ("gemma3-dense", {}),
        ("falcon-h1-dense", {"async": 1}),
        ("deepseek2-moe", {}),
    ],
)
def test_cells_follow_their_layers_to_a_device(
    family: str, options: dict[str, object], demo_model: Path, architectures: dict[str, Path], tmp_path: Path
) -> None:
    """What is in pages and on disk goes to a device with its layer, and comes back, in the middle of everything."""
    model = demo_model if family == "demo" else architectures[family]
    options = {"page": 16, "budget_pages": 66, "together": 0, "steps": 60 if family == "demo" else 200, **options}
    with rpc_server() as server:
        report = run(model, tmp_path, rpc=server.endpoint, **options)
    assert report["placements"] > 2
