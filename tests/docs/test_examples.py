"""The examples of the README and of the documentation run to their end on any machine, and say so where they cannot."""

from __future__ import annotations

import json
import re
import sys
import wave
from pathlib import Path

import gguf
import pytest
import tiny_model as tiny
from gguf_parts import STRING, read, write
from pages import PORTS, REASONS, RUN, SHOWN, Page, blocks_of, missing_programs, skipped
from PIL import Image
from tiny_projector import write_projector

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# a template whose conversations can have tools, as models have that were made for them
TOOLS = ROOT / "tests/engine/tools.jinja"
README = ROOT / "README.md"
PAGES = [README, *sorted(path for path in DOCS.rglob("*") if path.suffix in (".md", ".ipynb"))]
WITH_EXAMPLES = [page for page in PAGES if not all(block.language in SHOWN for block in blocks_of(page))]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def write_ollama(folder: Path, name: str, tag: str, model: Path) -> Path:
    """A folder as ollama keeps it, with one model."""
    manifest = folder / "manifests/registry.ollama.ai/library" / name / tag
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:1"}
    manifest.write_text(json.dumps({"layers": [layer]}))
    (folder / "blobs").mkdir()
    (folder / "blobs/sha256-1").symlink_to(model)
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> dict[str, Path]:
    """What stands in for the models that examples name."""
    folder = tmp_path_factory.mktemp("models")
    parts = read(demo_model)
    parts.set("tokenizer.chat_template", STRING, TOOLS.read_bytes())
    (folder / "model.gguf").write_bytes(write(parts))
    Image.effect_mandelbrot((64, 48), (-3, -2.5, 2, 2.5), 50).save(folder / "photo.png")
    with wave.open(str(folder / "speech.wav"), "wb") as out:
        out.setparams((1, 2, 16000, 0, "NONE", ""))
        out.writeframes(bytes(range(256)) * 25)
    return {
        "model.gguf": folder / "model.gguf",
        "mmproj.gguf": write_projector(folder / "mmproj.gguf", n_embd=576),  # the width of the demo model
        "photo.png": folder / "photo.png",
        "speech.wav": folder / "speech.wav",
        "embedding.gguf": tiny.write_bert(folder / "embedding.gguf"),
        "reranker.gguf": tiny.write_bert(folder / "reranker.gguf", pooling=gguf.PoolingType.RANK),
        "ollama": write_ollama(folder / "ollama", "llama3.2", "3b", folder / "model.gguf"),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")
@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=name_of)
def test_examples_run(page: Path, tmp_path: Path, models: dict[str, Path]) -> None:
    blocks = [block for block in blocks_of(page) if not skipped(block)]
    if page == README:  # whose commands are those of the pages, and are run there
        blocks = [block for block in blocks if block.language == "python"]
    if missing := missing_programs(blocks):
        pytest.skip(f"{', '.join(missing)} is not here")
    with Page(tmp_path, models, OLLAMA_MODELS=models["ollama"]) as running:
        for block in blocks:
            printed = running.run(block)
            if block.language == "python" and "print(" in block.code:
                assert len(printed) > 1, block.where


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_block_is_passed_over(page: Path) -> None:
    """Every fence is a block that was found, in a language that is run or only shown; a mark means something."""
    blocks = blocks_of(page)
    if page.suffix == ".md":
        text = page.read_text()
        assert len(re.findall(r"^\s*```", text, re.MULTILINE)) == 2 * len(blocks)
        assert len(re.findall(r"<!-- (?:not run|needs|serves)\b", text)) == sum(bool(block.mark) for block in blocks)
    for block in blocks:
        assert block.language in (*RUN, *SHOWN), block.where
        assert block.mark in (None, "not run", "needs", "serves"), block.where
        if block.mark == "not run":
            assert block.word in REASONS, f"{block.where}: {block.word!r} is none of the reasons"
        if block.mark == "serves":
            assert block.language == "sh" and block.word in PORTS, block.where


def test_most_examples_are_run() -> None:
    found = [block for page in PAGES for block in blocks_of(page) if block.language in RUN]
    not_run = [block for block in found if block.mark == "not run"]
    assert len(found) > 60 and len(not_run) < len(found) / 4, [block.where for block in not_run]


def test_notebooks_hold_no_results() -> None:
    notebooks = [page for page in PAGES if page.suffix == ".ipynb"]
    assert notebooks
    for page in notebooks:
        for cell in json.loads(page.read_text())["cells"]:
            assert not cell.get("outputs") and cell.get("execution_count") is None, page
