"""Odd requests, states, sizes and grammars: the cases of one seed, as far as the time goes.

`python tests/fuzz/fuzz_http.py --minutes 60` for more, and the same of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_control
import fuzz_grammars
import fuzz_http
import fuzz_sizes
import fuzz_states
import pytest
from rounds import check

SECONDS = 40
FUZZERS: dict[str, tuple[Callable[[int, Path], Any], int]] = {
    "control": (fuzz_control.Control, 3000),
    "grammars": (fuzz_grammars.Fuzzer, 5000),
    "http": (fuzz_http.Http, 5000),
    "sizes": (fuzz_sizes.fuzzer, 12000),
    "states": (fuzz_states.Fuzzer, 2500),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZERS)
def test_what_comes_from_outside_is_refused_or_used(name: str, tmp_path: Path) -> None:
    fuzzer, cases = FUZZERS[name]
    check(fuzzer(1, tmp_path), cases, SECONDS)
