"""Half a minute of odd requests, always the same; `python tests/fuzz/fuzz_http.py --minutes 60` for more."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_http import Http
from rounds import check

SECONDS = 40
CASES = 5000


@pytest.mark.slow
def test_odd_requests_are_refused_or_answered(tmp_path: Path) -> None:
    check(Http(1, tmp_path), CASES, SECONDS)
