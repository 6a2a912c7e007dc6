"""How tests run: threads that let others run, and the type of the fixture `run_python`, scripts in an interpreter of
their own.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable

# Tests share the cores with each other. Threads of OpenMP that spin where they wait take the core of the one that they
# wait for, and a minute becomes five. Set before the first runtime is loaded; programs inherit it.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

Runner = Callable[..., subprocess.CompletedProcess[str]]
