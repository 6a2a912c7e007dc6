"""The source distribution carries the tree of llama.cpp and the built page: nothing is fetched when it is built."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from superllama._doctor import build_facts

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a source distribution, made from a copy of what git knows."""
    pytest.importorskip("scikit_build_core")
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no checkout")
    folder = tmp_path_factory.mktemp("sdist")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / "copy" / name)
    code = f"from scikit_build_core.build import build_sdist; build_sdist({str(folder)!r})"
    mode = "AUTO" if build_facts()["page"] else "OFF"
    environment = os.environ | {"CMAKE_ARGS": f"-DSUPERLLAMA_PAGE={mode}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder / "copy", env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (archive,) = folder.glob("superllama-*.tar.gz")
    assert archive.stat().st_size < 30_000_000
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "out", filter="data")
    (out,) = (folder / "out").iterdir()
    return out


def test_nothing_is_fetched_to_build_it(unpacked: Path, tmp_path: Path) -> None:
    """The first steps of its build, with an index that has nothing, an empty cache and no Node.js."""
    (tmp_path / "bin").mkdir()
    for tool in ("git", "patch"):
        if path := shutil.which(tool):
            (tmp_path / "bin" / tool).symlink_to(path)
    environment = {
        **{"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), "SUPERLLAMA_CACHE": str(tmp_path / "cache")},
        **{"PIP_NO_INDEX": "1", "http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"},
    }

    def run(script: str, *arguments: str) -> str:
        command = [sys.executable, str(unpacked / "cmake" / script), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    tree = tmp_path / "tree"
    run("upstream.py", "patch", str(tree))
    assert (tree / "src" / "llama.cpp").is_file()
    if build_facts()["page"]:
        assert run("page.py", "put", str(tree), "ON") == "page"
        assert (tree / "tools/ui/dist/index.html").stat().st_size > 1000
    assert not (tmp_path / "cache").exists()


def test_what_a_packager_looks_for(unpacked: Path) -> None:
    assert (unpacked / "packaging" / "conda" / "recipe.yaml").is_file()
    text = (unpacked / "PKG-INFO").read_text()
    assert "Project-URL:" in text and "License-File: vendor/llama.cpp/LICENSE" in text
