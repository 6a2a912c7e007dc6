"""Engines that several tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_projector

import superllama

# a template whose conversations can have tools
TOOLS = Path(__file__).with_name("tools.jinja")


@pytest.fixture(scope="module")
def llm(tiny_model: Path) -> Iterator[superllama.LLM]:
    """A tiny random model, one sequence after the other: a random model's next token hangs on the last bit, and that on
    how many tokens are computed at once."""
    with superllama.LLM(tiny_model, n_ctx=1024, n_parallel=1, n_threads=1, chat_template="chatml") as engine:
        yield engine


@pytest.fixture(scope="module")
def wide_llm(tiny_model: Path) -> Iterator[superllama.LLM]:
    """The same, four at once."""
    with superllama.LLM(tiny_model, n_ctx=2048, n_threads=1, chat_template="chatml") as engine:
        yield engine


@pytest.fixture(scope="module")
def demo_llm(demo_model: Path) -> Iterator[superllama.LLM]:
    """The real model, with a template that has tools."""
    with superllama.LLM(demo_model, n_ctx=4096, chat_template_file=TOOLS) as engine:
        yield engine


@pytest.fixture(scope="session")
def projector(model_dir: Path) -> Path:
    """What makes the tiny model see and hear."""
    return tiny_projector.write_projector(model_dir / "mmproj.gguf")


@pytest.fixture(scope="module")
def seeing(tiny_model: Path, projector: Path) -> Iterator[superllama.LLM]:
    """The tiny model with a projector, one sequence after the other."""
    with superllama.LLM(
        tiny_model, mmproj=projector, n_ctx=512, n_parallel=1, n_threads=1, chat_template="chatml"
    ) as engine:
        yield engine
