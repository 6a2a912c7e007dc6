"""What a notebook shows of a model, an engine and a plan: parts of a page, whatever there is to say."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from parsed_html import Parsed

from superllama._look import html as _html

MIB = 1 << 20


def layer(index: int, tier: str, resident: int = 8, device: str | None = None) -> dict[str, Any]:
    return {"index": index, "tier": tier, "bytes": 8 * MIB, "bytes_resident": resident * MIB, "device": device}


LAYERS = [layer(0, "host"), layer(1, "disk", 2), layer(2, "device", 8, "GPU0")]
TAGS = {"pinned": 60 * MIB, "kv": 30 * MIB, "compute": MIB, "ring": 0, "page_tables": 1000}


def test_memory_and_layers() -> None:
    part = Parsed(_html.status("a model", tags=TAGS, layers=LAYERS, budget=100 * MIB, facts=["7B"]))
    for words in (
        "a model",
        "7B",
        "memory 91.0 MiB of 100 MiB",
        "pinned: 60 MiB",
        "other: 1.00 MiB",
        "1 read when needed",
    ):
        assert words in part.words
    assert part.links == [] and "style" not in part.tags and "script" not in part.tags
    assert "layer 1: 8 MiB, 2 MiB of it in memory, the rest is read when needed" in part.words
    assert "layer 2: 8 MiB, on GPU0" in part.words
    assert "budget auto" in _html.status("a model", tags=TAGS, layers=LAYERS, budget=0)


def test_a_row_of_layers_shows_how_much_of_each_is_there() -> None:
    cells = _html.cells(LAYERS)
    assert [cell["filled"] for cell in cells] == [100, 25, 100]
    assert [cell["left"] for cell in cells] == pytest.approx([0, 100 / 3, 200 / 3])
    assert _html.cells([layer(0, "disk", 0) | {"bytes": 0}])[0]["filled"] == 100


def test_parts_of_memory_fill_the_share_of_the_budget_that_they_have() -> None:
    parts = _html.bar([("a", 30, "#000", ""), ("none", 0, "#000", ""), ("b", 20, "#000", "")], whole=100)
    assert [(part.name, part.left, part.width) for part in parts] == [("a", 0, 30), ("b", 30, 20)]
    over = _html.bar([("a", 150, "#000", "")], whole=100)
    assert over[0].width == 100


def test_without_dynamic_layers_there_is_one_line() -> None:
    part = Parsed(_html.status("a model", tags={"kv": 0}, layers=[], budget=0, facts=["7B"]))
    assert "7B, no dynamic layers: its memory is the kernel's" in part.words and "svg" not in part.tags


def test_names_are_text() -> None:
    bad = "<img src=x>"
    text = _html.status(bad, tags={bad: MIB}, layers=[layer(0, "device", 8, bad)], budget=MIB, facts=[bad])
    assert "img" not in Parsed(text).tags and text.count("&lt;img") >= 4


def test_whatever_is_wrong_is_said_and_not_raised() -> None:
    def fails() -> dict[str, Any]:
        raise KeyError("<b>")

    assert "&lt;b&gt;" in _html.shown("a model", fails)
    assert "TypeError" in _html.shown("a model", lambda: (_ for _ in ()).throw(TypeError()))
    assert "unexpected keyword" in _html.shown("a model", lambda: {"nonsense": 1})


def test_nobody_waits_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_html, "PATIENCE_S", 0.05)
    freed = threading.Event()

    def waits() -> dict[str, Any]:
        freed.wait(60)
        return {}

    try:
        assert "busy" in _html.shown("a model", waits)
    finally:
        freed.set()


def test_a_system_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuses)
    assert "a model" in _html.shown("a model", dict)
