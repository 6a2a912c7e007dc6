"""Half a minute of malformed states, always the same; `python tests/fuzz/fuzz_states.py --minutes 60` for more."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_states import Fuzzer
from rounds import check

SECONDS = 40
CASES = 2500


@pytest.mark.slow
def test_malformed_states_are_refused_or_used(tmp_path: Path) -> None:
    check(Fuzzer(1, tmp_path), CASES, SECONDS)
