"""The documentation as a site: it builds without a warning, names all that is public, loads nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import superllama

pytest.importorskip("mkdocs", reason='the tools are in the extra "docs"')
pytest.importorskip("mkdocstrings", reason='the tools are in the extra "docs"')

ROOT = Path(__file__).parents[2]
ELSEWHERE = re.compile(r"(?:https?:)?//(?!127\.0\.0\.1)")
# what a browser fetches by itself, other than links that a reader follows
LOADS = re.compile(
    r"<(?:script|img|iframe|source|video|object|embed)\b[^>]*?\b(?:src|data)=\"([^\"]*)\"", re.IGNORECASE
)
LINKS = re.compile(r"<link\b[^>]*>", re.IGNORECASE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and not re.search("^WARNING", done.stderr, re.MULTILINE), done.stderr[-3000:]
    return folder


def test_nothing_comes_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        html = page.read_text()
        loads = LOADS.findall(html) + re.findall(r"href=\"([^\"]*)\"", " ".join(LINKS.findall(html)))
        assert loads and not [address for address in loads if ELSEWHERE.match(address)], page
    for style in site.rglob("*.css"):
        found = re.findall(r"(?:url\(|@import\s+)[\"']?([^\"')]+)", style.read_text())
        assert not [address for address in found if ELSEWHERE.match(address)], style


def test_all_that_is_public_is_in_the_reference(site: Path) -> None:
    html = "".join(page.read_text() for page in (site / "api").rglob("*.html"))
    public = {name for name in superllama.__all__ if not name.startswith("__")}
    assert not {name for name in public if f'id="superllama.{name}"' not in html}
