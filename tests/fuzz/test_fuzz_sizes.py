"""Sizes, or nearly, for half a minute, always the same; `python tests/fuzz/fuzz_sizes.py --minutes 60` for more."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_sizes import fuzzer
from rounds import check

SECONDS = 40
CASES = 12000


@pytest.mark.slow
def test_sizes_are_numbers_or_errors(tmp_path: Path) -> None:
    check(fuzzer(1, tmp_path), CASES, SECONDS)
