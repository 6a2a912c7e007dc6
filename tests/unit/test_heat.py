"""The map of experts: what is drawn is what the numbers say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest
from parsed_html import Parsed

from superllama._look import html as _html
from superllama._look.drawing import TIER_COLOURS
from superllama._look.heat import STRENGTHS, TIERS, heat_map

EXPERTS: dict[str, Any] = {
    "layers": [1, 2, 5],
    "uses": [[0, 0, 9, 9], [3, 0, 100, 1], [0, 0, 0, 0]],
    "misses": [[0] * 4] * 3,
    "tier": [[0, 0, 0, 1], [1, 1, 0, 0], [2, 2, 2, 2]],
}


def drawn(experts: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """The colour and the strength of each cell, from the paths."""
    found = heat_map(experts)
    assert found is not None
    colours = np.full((found.rows, found.columns), "", object)
    strengths = np.zeros(colours.shape)
    for shade in found.shades:
        for x, y, width, back in re.findall(r"M(\d+) (\d+)h(\d+)v1h-(\d+)z", shade.path):
            assert width == back
            cells = slice(int(x), int(x) + int(width))
            assert (colours[int(y), cells] == "").all()  # no cell is drawn twice
            colours[int(y), cells], strengths[int(y), cells] = shade.colour, shade.strength
    return colours, strengths


def test_each_cell_has_the_colour_of_its_tier_and_the_strength_of_its_count() -> None:
    colours, strengths = drawn(EXPERTS)
    assert colours.tolist() == [[TIER_COLOURS[TIERS[tier]] for tier in row] for row in EXPERTS["tier"]]
    uses = np.array(EXPERTS["uses"])
    assert (strengths[uses == 0] == STRENGTHS[0]).all() and (strengths[uses > 0] > STRENGTHS[0]).all()
    assert strengths[1, 2] == 1.0  # the most
    order = np.argsort(uses, axis=None)
    assert (np.diff(strengths.flat[order]) >= 0).all()


def test_random_maps_are_drawn_whole() -> None:
    random = np.random.default_rng(2)
    uses, tier = random.integers(0, 50, (40, 128)), random.integers(0, 3, (40, 128))
    colours, strengths = drawn({"layers": list(range(40)), "uses": uses.tolist(), "tier": tier.tolist()})
    assert (colours == np.array([TIER_COLOURS[t] for t in TIERS], object)[tier]).all()
    assert ((strengths == STRENGTHS[0]) == (uses == 0)).all()


def test_what_it_says() -> None:
    found = heat_map(EXPERTS)
    assert found is not None
    assert found.said == "half of 122 choices went to 8 % of 12 experts; 7 were never chosen"
    assert found.tiers == [
        ("in memory", 5, TIER_COLOURS["host"]),
        ("read when needed", 3, TIER_COLOURS["disk"]),
        ("on devices", 4, TIER_COLOURS["device"]),
    ]
    assert [text for _, text in found.scale] == ["1", "2", "5"]
    assert [top for top, _ in found.scale] == pytest.approx([100 / 6, 50, 500 / 6])
    unused = heat_map({"layers": [0], "uses": [[0, 0]], "tier": [[1, 1]]})
    assert unused is not None and unused.said == "none was chosen so far"


@pytest.mark.parametrize("n", [1, 2, 7, 48, 94, 600])
def test_the_scale_names_few_layers_and_the_ends(n: int) -> None:
    found = heat_map({"layers": list(range(n)), "uses": [[1]] * n, "tier": [[0]] * n})
    assert found is not None
    texts = [int(text) for _, text in found.scale]
    assert texts[0] == 0 and texts[-1] == n - 1 and len(set(texts)) == len(texts) <= 8
    assert 40 <= found.height <= 420


def test_without_experts_nothing_is_drawn() -> None:
    assert heat_map(None) is None
    assert heat_map({"layers": [], "uses": [], "tier": []}) is None


def test_a_notebook_shows_it() -> None:
    layers = [{"index": 0, "tier": "host", "bytes": 8, "bytes_resident": 8, "device": None}]
    text = _html.status("m", tags={"experts": 1 << 20}, layers=layers, budget=0, experts=EXPERTS)
    part = Parsed(text)
    assert "half of 122 choices" in part.words and "style" not in part.tags and "script" not in part.tags
    assert "experts by layer" in text and part.links == []
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ET.fromstring(svg)
