"""Graphics cards for tests: one of this machine, or one that Mesa computes on the processor.

The second needs Mesa's Vulkan drivers, and ggml's backend as `tools/wheel.sh vulkan` builds it.
tests/native/limited-gpu shows it as a card with memory of its own, of any size, in the processes whose environment
names it, and nowhere else. `python tests/cards.py COMMAND...` runs a command in such an environment.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from native_build import BUILD, native_programs
from rpc_devices import hide_gpus

import superllama

LAYER = "VK_LAYER_test_limited_gpu"  # as tests/native/limited-gpu.cpp names it
CARD_BYTES = 1_500_000_000
KEPT_BYTES = 32 << 20  # of freed memory: the most that glibc takes for the first of the two that say so

_KINDS = "import superllama; print([d.kind for d in superllama.devices() if d.backend != 'RPC'])"


def hide_cards(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests that are for a card see one: a parameter of theirs says so."""
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or not any(value in ("gpu", "card") for value in callspec.params.values()):
        hide_gpus(monkeypatch)


def show_card(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Any card, to which experts that it lacks are sent, whatever the speeds of this machine."""
    hide_cards(request, monkeypatch)
    for name, value in any_card().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("SUPERLLAMA_EXPERTS", "send")


def any_card() -> Mapping[str, str]:
    """What a process needs in its environment to see a card, be it nothing. Skips where there is none."""
    here = any(d.kind == "gpu" and d.backend != "RPC" for d in superllama.devices())
    return {} if here else computed_card(CARD_BYTES)


def computed_card(total_bytes: int, taken: Path | None = None) -> Mapping[str, str]:
    """The same for one that Mesa computes; `taken` holds the bytes that "another program" has there."""
    card = _computed_card()
    if card is None:
        missing = pytest.fail if os.environ.get("SUPERLLAMA_NEEDS_CARD") else pytest.skip
        missing("Mesa computes no card here (tools/wheel.sh vulkan)")
    environment = {**card, "LIMITED_GPU_BYTES": str(total_bytes)}
    return environment if taken is None else {**environment, "LIMITED_GPU_TAKEN": str(taken)}


@functools.cache
def _computed_card() -> Mapping[str, str] | None:
    backend = BUILD / "backend-vulkan/bin/libggml-vulkan.so"
    layer = native_programs() / "liblimited-gpu.so"
    if not (backend.is_file() and layer.is_file()):
        return None
    folder = Path(tempfile.mkdtemp(prefix="superllama-card-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    manifest = {
        "name": LAYER,
        "type": "GLOBAL",
        "library_path": str(layer),
        "api_version": "1.3.239",
        "implementation_version": "1",
        "description": "a card for tests",
    }
    (folder / "layer.json").write_text(json.dumps({"file_format_version": "1.1.2", "layer": manifest}))
    environment = {
        "GGML_BACKEND_PATH": str(backend),
        "VK_LAYER_PATH": str(folder),
        "VK_INSTANCE_LAYERS": LAYER,
        "MESA_SHADER_CACHE_DIR": str(BUILD / "backend-vulkan"),  # compiling them takes longer than most tests
        # Mesa allocates for every workgroup that has barriers. Memory that is given back in between halves its speed,
        # in processes where nothing large happened to be freed before.
        "MALLOC_MMAP_THRESHOLD_": str(KEPT_BYTES),
        "MALLOC_TRIM_THRESHOLD_": str(KEPT_BYTES),
    }
    command = [sys.executable, "-c", _KINDS]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    return environment if done.returncode == 0 and "gpu" in done.stdout else None


def main(command: list[str]) -> int:
    try:
        environment = computed_card(CARD_BYTES)
    except (pytest.skip.Exception, pytest.fail.Exception, RuntimeError) as error:
        sys.exit(f"cards.py: {error}")
    return subprocess.call(command, env={**os.environ, **environment})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
