"""The type of the fixture `run_python`: scripts in an interpreter of their own."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

Runner = Callable[..., subprocess.CompletedProcess[str]]
