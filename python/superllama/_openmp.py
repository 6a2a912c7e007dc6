"""Threads of OpenMP spin where they wait for each other. On a machine that does other things too, they spin on the core
of the one that they wait for, for a time slice at each operation: a twentieth of the speed, with any llama.cpp.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

# GCC's runtime spins 300,000 times by default. This many are some microseconds: long enough for a barrier between two
# operations on a quiet machine, short enough to be nothing beside a time slice.
SPINS = "1000"


def short_spin(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to `environment` before the runtime is loaded; nothing where the user has decided."""
    decided = "GOMP_SPINCOUNT" in environment or "OMP_WAIT_POLICY" in environment
    return {} if decided else {"GOMP_SPINCOUNT": SPINS}


@contextlib.contextmanager
def short_spins() -> Iterator[None]:
    """Around the loading of libraries: then the runtime reads its variables, which are the user's again afterwards."""
    added = short_spin(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
