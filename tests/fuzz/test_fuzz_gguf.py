"""Malformed model files, the cases of one seed for a minute; `python tests/fuzz/fuzz_gguf.py --minutes 60` for more."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

if sys.platform != "linux":
    pytest.skip("the program that tries the files needs fork()", allow_module_level=True)

from fuzz_gguf import Fuzzer
from rounds import check, scratch

SECONDS = 60
CASES = 3000


@pytest.fixture
def fuzzer() -> Iterator[Fuzzer]:
    with scratch() as folder:
        found = Fuzzer(1, folder)
        yield found
        found.close()  # a second time changes nothing


def test_valid_files_are_refused_by_no_rule(fuzzer: Fuzzer) -> None:
    assert [str(o) for o in fuzzer.unchanged() if o.verdict != "ok"] == []


@pytest.mark.slow
def test_no_malformed_file_ends_the_process(fuzzer: Fuzzer) -> None:
    check(fuzzer, CASES, SECONDS)


@pytest.mark.slow
def test_no_tensor_that_is_left_out_ends_the_process(fuzzer: Fuzzer) -> None:
    """One in twenty of all architectures; `left_out(1)` are all."""
    assert [str(o)[:300] for o in fuzzer.left_out(20) if o.wrong] == []
