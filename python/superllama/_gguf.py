"""Look at a model file before the library does: what is wrong with it is said here, in words."""

from __future__ import annotations

import os
import re
import struct
from pathlib import Path

from ._errors import ModelError
from ._files import check_mode, open_files_hint, open_regular
from ._models import by_name

HEADER_BYTES = 24  # magic, version, number of tensors, number of metadata entries
VERSIONS = (2, 3)

# what other files begin with
_OTHERS = {
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself (git lfs pull)",
    b"PK\x03\x04": "a zip archive, perhaps a PyTorch checkpoint; convert it to GGUF first",
    b"<!doctype": "a web page, so the download went wrong",
    b"<html": "a web page, so the download went wrong",
    b"lmgg": "a GGML file of before 2023-08; convert it to GGUF first",
    b"tjgg": "a GGML file of before 2023-08; convert it to GGUF first",
    b"fugu": "a GGUF file in the other byte order",
}


def check_gguf(path: str | os.PathLike[str]) -> Path:
    """The path, if a GGUF file may be there; a name of a model that another program keeps is its path (_models). Only
    the header's first bytes are read.

    Raises: ModelError that says what is there instead.
    """
    path = by_name(path)
    try:
        file = Path(os.fsdecode(path)) if isinstance(path, str | bytes | os.PathLike) else None
        if file is not None and file.is_dir():
            raise ModelError(f"{file} is a folder, not a model file; name the .gguf file in it{_examples(file)}")
        with open_regular(path, ModelError) as f:
            head = f.read(HEADER_BYTES + 8)
    except FileNotFoundError as e:
        raise ModelError(f"{file} does not exist (the current folder is {_here()})") from e
    except (OSError, ValueError) as e:
        why = str(e.strerror or e if isinstance(e, OSError) else e)
        raise ModelError(f"cannot open {path!r}: {why}{open_files_hint(why)}") from e
    assert file is not None

    if not head:
        raise ModelError(f"{file} is empty; fetch it again")
    if head[:4] != b"GGUF":
        what = next((text for start, text in _OTHERS.items() if head.lower().startswith(start.lower())), None)
        if head[8:9] == b"{":
            what = "a safetensors file; convert it to GGUF first"
        raise ModelError(
            f"{file} is not a GGUF file: it begins with {head[:4]!r}" + (f", it is {what}" if what else "")
        )
    if len(head) < HEADER_BYTES:
        raise ModelError(
            f"{file} is cut off: {file.stat().st_size} bytes, the header alone has {HEADER_BYTES}; fetch it again"
        )
    _check_parts(file)
    (version,) = struct.unpack_from("<I", head, 4)
    if version not in VERSIONS:
        raise ModelError(f"{file} is GGUF version {version}; this library reads {VERSIONS[0]} and {VERSIONS[1]}")
    return file


def _check_parts(file: Path) -> None:
    """The other parts of a split model, which the library opens by their names."""
    if parts := re.fullmatch(r"(.+-)00001(-of-(\d{5})\.gguf)", file.name):
        for i in range(2, int(parts[3]) + 1):
            part = file.with_name(f"{parts[1]}{i:05}{parts[2]}")
            if part.exists():  # else the library names it
                check_mode(part, part.stat().st_mode, ModelError)


def _here() -> str:
    try:
        return str(Path.cwd())
    except FileNotFoundError:
        return "gone"


def _examples(folder: Path) -> str:
    names = sorted(p.name for p in folder.glob("*.gguf"))[:3]
    return f": {', '.join(names)}" if names else ""
