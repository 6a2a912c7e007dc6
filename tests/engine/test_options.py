"""Options of an engine as flags, without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from superllama._engine.options import arguments
from superllama._models import found_models


def flags_of(model: Path, **options: Any) -> set[str]:
    return {word for word in arguments(str(model), options) if word.startswith("--")}


@pytest.mark.parametrize(
    ("options", "reads_ahead"),
    [
        ({"mem_budget": "8GiB"}, True),
        ({"vram_budget": 0}, True),
        ({"vram_budget": ["1GiB", "auto"]}, True),
        ({"dynamic_layers": True}, True),
        ({"flags": {"mem_budget": "8GiB"}}, True),
        ({"mem_budget": "8GiB", "async_prefetch": False}, False),
        ({"mem_budget": "8GiB", "dynamic_layers": False}, False),
        ({"mem_budget": "auto", "vram_budget": None}, False),
        ({"kv_budget": "1GiB"}, False),
        ({}, False),
    ],
    ids=str,
)
def test_where_layers_are_dynamic_they_are_read_ahead(
    tiny_model: Path, options: dict[str, Any], reads_ahead: bool
) -> None:
    assert ("--async-prefetch" in flags_of(tiny_model, **options)) is reads_ahead


def test_sequences_share_the_context_however_many_there_are(tiny_model: Path) -> None:
    assert "--kv-unified" in flags_of(tiny_model, n_parallel=8)
    assert "--no-kv-unified" in flags_of(tiny_model, n_parallel=8, kv_unified=False)


def test_none_is_as_if_it_had_been_left_out(tiny_model: Path) -> None:
    assert arguments(str(tiny_model), {"n_ctx": None, "ctx_size": 64}) == arguments(str(tiny_model), {"n_ctx": 64})


def test_a_draft_model_may_be_named_too(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMSTUDIO_MODELS", str(tmp_path))
    (tmp_path / "org/repo").mkdir(parents=True)
    (tmp_path / "org/repo/m.gguf").symlink_to(tiny_model)
    (name,) = [found.name for found in found_models() if found.name.startswith("lmstudio:")]
    assert str(tmp_path / "org/repo/m.gguf") in arguments(str(tiny_model), {"speculative": name})
