"""A minute of malformed model files, always the same; `python tests/fuzz/fuzz_gguf.py --minutes 60` for more."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

if sys.platform != "linux":
    pytest.skip("the program that tries the files needs fork()", allow_module_level=True)

from fuzz_gguf import Fuzzer, in_memory

SECONDS = 60
CASES = 3000


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzer]:
    memory = in_memory()
    folder = Path(memory) / f"superllama-fuzz-{time.time_ns()}" if memory else tmp_path_factory.mktemp("fuzz")
    folder.mkdir(exist_ok=True)
    fuzzer = Fuzzer(seed=1, folder=folder)
    yield fuzzer
    fuzzer.close()
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def test_valid_files_are_refused_by_no_rule(fuzzer: Fuzzer) -> None:
    assert [str(o) for o in fuzzer.unchanged() if o.verdict != "ok"] == []


@pytest.mark.slow
def test_no_malformed_file_ends_the_process(fuzzer: Fuzzer) -> None:
    end = time.monotonic() + SECONDS
    outcomes = []
    for number in range(CASES):
        outcomes.append(fuzzer.run(number))
        if time.monotonic() > end:
            break
    assert [str(o) for o in outcomes if o.wrong] == []
    assert {o.verdict for o in outcomes} == {"ok", "refused"}
