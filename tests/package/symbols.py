"""The dynamic symbols of what is installed, by nm."""

from __future__ import annotations

import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import superllama._ffi

from superllama._programs import find_bin_dir


def libraries() -> list[Path]:
    """Every shared library of the installed package, the binding included."""
    module = Path(superllama._ffi.__file__)
    bin_dir = find_bin_dir()
    assert bin_dir is not None
    found = [module]
    for folder in (module.parent / "lib", bin_dir):
        found += sorted(folder.glob("*.so"))
    return found


@cache
def _names(library: Path, which: str) -> list[str]:
    if shutil.which("nm") is None:
        pytest.skip("there is no nm")
    command = ["nm", "-D", which, "--format=posix", str(library)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [line.split()[0].split("@")[0] for line in out.splitlines()]


def exported(library: Path) -> list[str]:
    """Names that the library offers to others, as they are in the file."""
    return _names(library, "--defined-only")


def needed(library: Path) -> list[str]:
    """Names that the library takes from others."""
    return _names(library, "--undefined-only")
