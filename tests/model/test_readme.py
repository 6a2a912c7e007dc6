"""The README's Python runs to its end on any machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from running import Runner

README = Path(__file__).parents[2] / "README.md"


EXAMPLES = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs(example: str, demo_model: Path, run_python: Runner) -> None:
    done = run_python(example.replace('"model.gguf"', repr(str(demo_model))))
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) > 30


def test_there_are_examples() -> None:
    """The first screen, and three in the chapter on Python."""
    assert len(EXAMPLES) == 4
