"""A projector lies in the budget of its model: planned, charged, and refused where there is no room for it."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_projector
from dynamic import MIB
from PIL import Image
from running import Runner
from serving import http_server

import superllama
from superllama import cli

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")

CONTEXT: dict[str, Any] = {"n_ctx": 2048, "n_ubatch": 64, "n_threads": 1}
ENGINE: dict[str, Any] = {**CONTEXT, "n_parallel": 2, "n_batch": 64, "repack": False, "cache_ram": 0}
PROMPT = "the <__media__> a"


@pytest.fixture(scope="session")
def large(model_dir: Path) -> Path:
    """A projector that is larger than the rest of the tiny model, and computes in some MiB."""
    return tiny_projector.write_projector(
        model_dir / "mmproj-large.gguf", hears=False, width=512, n_layer=6, image_size=224
    )


def photo() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((30, 40, 3), 77, np.uint8)).save(file, "PNG")
    return file.getvalue()


def planned(model: Path, mmproj: Path | None, mem_budget: int | str = "1GiB") -> superllama.Plan:
    return superllama.plan(
        model, mmproj=mmproj, use="llm", n_parallel=2, repack=False, mem_budget=mem_budget, **CONTEXT
    )


def sees(model: Path, mmproj: Path, mem_budget: int | str) -> dict[str, int]:
    """What its memory is for, after an image. Raises: ModelError if it cannot be loaded so."""
    with superllama.LLM(model, mmproj=mmproj, mem_budget=mem_budget, **ENGINE) as llm:
        found = llm.generate({"prompt": PROMPT, "images": [photo()]}, max_tokens=4, ignore_eos=True)
        assert len(found.tokens) == 4
        return llm.memory()


def test_a_plan_counts_it(tiny_model: Path, large: Path, capsys: pytest.CaptureFixture[str]) -> None:
    alone, seeing = planned(tiny_model, None), planned(tiny_model, large)
    n_bytes = seeing.asked.projector_bytes
    assert alone.asked.projector_bytes == 0
    assert n_bytes > large.stat().st_size + MIB  # its weights, and what it computes in
    assert seeing.mem_least_bytes >= alone.mem_least_bytes + n_bytes
    assert seeing.mem_full_bytes >= alone.mem_full_bytes + n_bytes
    assert cli.main(["plan", str(tiny_model), "--mmproj", str(large), "-c", "256"]) == 0
    said = capsys.readouterr().out
    assert "of the projector" in said
    assert cli.main(["plan", str(tiny_model), "--mmproj", str(large), "-c", "256", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["asked"]["projector_bytes"] == n_bytes


def test_it_is_in_memory_under_its_own_name(tiny_model: Path, projector: Path) -> None:
    n_bytes = planned(tiny_model, projector).asked.projector_bytes
    with superllama.LLM(tiny_model, mmproj=projector, mem_budget="256MiB", **ENGINE) as llm:
        assert llm.memory()["projector"] == n_bytes
        assert llm.metrics().memory_by_tag["projector"] == n_bytes
        llm.pause()
        llm.resume()  # which loads both again
        assert llm.memory()["projector"] == n_bytes
    with superllama.LLM(tiny_model, mem_budget="256MiB", **ENGINE) as llm:
        assert llm.memory()["projector"] == 0


# In an interpreter of its own: what the process takes while it loads the projector and looks at images, and at the end,
# beside what the engine says that it is for. Once before, so that heap and libraries are there.
SCRIPT = """
import ctypes, json, sys, threading
import superllama

path, mmproj, budget, image, options = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4], json.loads(sys.argv[5])

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) << 10

peak, ends = 0, threading.Event()

def watch():
    global peak
    while not ends.wait(0.002):
        peak = max(peak, anonymous())

def measure(**kwargs):
    global peak
    with superllama.LLM(path, mmproj=mmproj, **options, **kwargs) as llm:
        for _ in range(3):
            llm.generate({"prompt": "the <__media__> a", "images": [open(image, "rb").read()]}, max_tokens=4)
        ctypes.CDLL(None).malloc_trim(0)
        return llm.memory(), anonymous()

measure(mem_budget=budget)
ctypes.CDLL(None).malloc_trim(0)
base = peak = anonymous()
watcher = threading.Thread(target=watch)
watcher.start()
memory, used = measure(mem_budget=budget)
ends.set()
watcher.join()
print(json.dumps(dict(memory=memory, used=used - base, peak=peak - base)))
"""


@pytest.mark.parametrize("no_warmup", [False, True])
def test_the_ledger_is_the_memory_of_images(
    run_python: Runner, tiny_model: Path, large: Path, tmp_path: Path, no_warmup: bool
) -> None:
    (tmp_path / "image.png").write_bytes(photo())
    budget = planned(tiny_model, large).mem_full_bytes
    options = ENGINE | ({"no_warmup": True} if no_warmup else {})
    done = run_python(SCRIPT, tiny_model, large, budget, tmp_path / "image.png", json.dumps(options))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    total = sum(found["memory"].values())
    assert found["memory"]["projector"] > large.stat().st_size
    assert total <= budget
    assert abs(found["used"] - total) <= 8 * MIB, found
    assert found["peak"] <= budget + 8 * MIB, found


def test_the_least_that_an_error_names_works(tiny_model: Path, large: Path) -> None:
    n_bytes = planned(tiny_model, large).asked.projector_bytes
    budget, n_errors = n_bytes // 2, 0
    while True:
        try:
            memory = sees(tiny_model, large, budget)
            break
        except superllama.ModelError as e:
            why = str(e)
        assert f"({n_bytes / MIB:.0f} MiB of the projector)" in why
        n_errors += 1
        assert n_errors <= 2, why  # what the model needs, and then what the context does
        budget = int(re.findall(r"the least that works is (\d+) MiB", why)[0]) * MIB
    assert n_errors
    assert memory["projector"] == n_bytes
    assert sum(memory.values()) <= budget
    with pytest.raises(superllama.ModelError, match="the least that works"):
        sees(tiny_model, large, budget - 2 * MIB)


def test_the_least_of_a_plan_works(tiny_model: Path, large: Path) -> None:
    least = planned(tiny_model, large).mem_least_bytes
    assert sum(sees(tiny_model, large, least).values()) <= least
    with pytest.raises(superllama.ModelError, match="MiB of the projector"):
        sees(tiny_model, large, least - planned(tiny_model, large).asked.projector_bytes)


def test_a_budget_that_shrinks_keeps_it(tiny_model: Path, large: Path) -> None:
    plan = planned(tiny_model, large)
    with superllama.LLM(tiny_model, mmproj=large, mem_budget=plan.mem_full_bytes, **ENGINE) as llm:
        with pytest.raises(superllama.Error, match="the least that works is"):
            llm.set_budget(plan.mem_least_bytes - plan.asked.projector_bytes)
        llm.set_budget(plan.mem_least_bytes)
        found = llm.generate({"prompt": PROMPT, "images": [photo()]}, max_tokens=4, ignore_eos=True)
        assert len(found.tokens) == 4
        assert sum(llm.memory().values()) <= plan.mem_least_bytes


def test_over_http(tiny_model: Path, large: Path, tmp_path: Path) -> None:
    n_bytes = planned(tiny_model, large).asked.projector_bytes
    flags = ["--mmproj", large, "--mem-budget", "256MiB", "-c", 512, "-ub", 64, "-t", 1, "--no-repack"]
    with http_server(tiny_model, tmp_path / "log", *flags) as server:
        assert server.request("/superllama")[1]["metrics"]["memory_by_tag"]["projector"] == n_bytes


def test_what_is_no_projector(tiny_model: Path, projector: Path, tmp_path: Path) -> None:
    with pytest.raises(superllama.ModelError, match="not a projector"):
        superllama.plan(tiny_model, mmproj=tiny_model)
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(projector.read_bytes()[:200])
    with pytest.raises(superllama.ModelError, match="projector"):
        superllama.plan(tiny_model, mmproj=cut)
