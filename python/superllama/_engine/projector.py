"""The file of a projector, looked at before the library does: of what it finds there it says only that it failed."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .._errors import ModelError
from .._gguf import check_gguf

_HEAD_BYTES = 1 << 16  # its kind is among the first keys
_KIND = re.compile(rb"general\.architecture\x08\0\0\0(.)\0\0\0\0\0\0\0", re.DOTALL)  # a text, and how long it is


def check_projector(path: str | os.PathLike[str]) -> Path:
    """The path, if a projector may be there. Raises: ModelError that says what is there instead."""
    file = check_gguf(path)
    with file.open("rb") as f:
        head = f.read(_HEAD_BYTES)
    if found := _KIND.search(head):
        kind = head[found.end() : found.end() + found[1][0]].decode("utf-8", "replace")
        if kind != "clip":
            raise ModelError(
                f"{file} is a model ({kind}), not a projector; mmproj= names the file beside the model that makes "
                "images and sounds into its tokens (mmproj-*.gguf)"
            )
    return file
