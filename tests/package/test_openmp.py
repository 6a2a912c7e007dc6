"""The OpenMP runtime is told to spin briefly, before it is loaded, unless the user said how it is to wait."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence

import pytest

PYTHON = [sys.executable, "-c", "import os, superllama; superllama.devices(); print(os.environ.get('GOMP_SPINCOUNT'))"]
PROGRAM = [
    *(sys.executable, "-c"),
    "import sys; from superllama._programs import completion; sys.argv[1:] = ['--version']; completion()",
]


def run(command: Sequence[str], more: Mapping[str, str]) -> tuple[str, str]:
    """What it prints, and the count that the runtime has, as it shows when it is asked to."""
    mine = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_"))}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**mine, "OMP_DISPLAY_ENV": "verbose", **more}
    )
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"GOMP_SPINCOUNT = '(\d+)'", done.stderr)
    if not shown:
        pytest.skip("the OpenMP runtime is not GCC's")
    return done.stdout, shown[0]


@pytest.mark.parametrize("command", [PYTHON, PROGRAM], ids=["python", "program"])
def test_short_unless_the_user_says_otherwise(command: list[str]) -> None:
    assert run(command, {})[1] == "1000"
    assert run(command, {"GOMP_SPINCOUNT": "77"})[1] == "77"
    assert run(command, {"OMP_WAIT_POLICY": "passive"})[1] == "0"


def test_what_a_process_starts_later_is_not_told() -> None:
    assert run(PYTHON, {})[0] == "None\n"
