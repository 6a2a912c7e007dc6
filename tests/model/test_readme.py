"""The README's Python runs to its end on any machine."""

from __future__ import annotations

import re
from pathlib import Path

from running import Runner

README = Path(__file__).parents[2] / "README.md"


def test_the_example_runs(demo_model: Path, run_python: Runner) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    done = run_python(example)
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout) > 100
