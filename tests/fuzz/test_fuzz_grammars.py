"""Broken grammars and schemas for half a minute, always the same;
`python tests/fuzz/fuzz_grammars.py --minutes 60` for more.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_grammars import Fuzzer
from rounds import check

SECONDS = 40
CASES = 5000


@pytest.mark.slow
def test_broken_grammars_are_refused_or_used(tmp_path: Path) -> None:
    check(Fuzzer(1, tmp_path), CASES, SECONDS)
