"""Models, engines and plans in a notebook: what is shown is what they say, and no use of a cell ends in an error."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from dynamic import budgets
from parsed_html import Parsed
from running import Runner

import superllama
from superllama._look.amounts import memory, number

linux = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers and forks need Linux")


def shown(thing: object) -> str:
    return Parsed(thing._repr_html_()).words  # type: ignore[attr-defined]


@linux
def test_a_model_that_streams(tiny_model: Path) -> None:
    least, most = budgets(tiny_model)
    budget = (least + most) // 2
    with superllama.Model(tiny_model, mem_budget=budget) as model, superllama.Context(model, n_ctx=64) as ctx:
        ctx.decode(model.tokenize("the a of"))
        said = shown(model)
        assert model.path.name in said and f"of {memory(budget)}" in said
        assert "read when needed" in said and "layer 0: " in said
        model.set_budget("auto")
        assert "budget auto" in shown(model)
    assert f"the model {model.path.name} is closed" in shown(model)


def test_a_model_without_dynamic_layers(model: superllama.Model) -> None:
    assert "no dynamic layers" in shown(model)


@linux
def test_an_engine(tiny_model: Path) -> None:
    with superllama.LLM(tiny_model, n_ctx=128, n_parallel=1, n_threads=1, mem_budget="1GiB") as llm:
        llm.generate("the", max_tokens=5, ignore_eos=True)  # the first one is the prompt's
        said = shown(llm)
        assert tiny_model.name in said and "4 tokens generated" in said and "of 1 GiB" in said
    assert "closed" in shown(llm)


@linux
def test_a_model_of_the_process_that_this_one_was_forked_from(tiny_model: Path, run_python: Runner) -> None:
    script = """
import os, sys, superllama
model = superllama.Model(sys.argv[1])
superllama.Context(model, n_ctx=64).decode([1])
if (pid := os.fork()) == 0:
    print(model._repr_html_(), flush=True)
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
"""
    done = run_python(script, tiny_model)
    assert done.returncode == 0, done.stderr
    assert "forked" in done.stdout


def test_a_plan(tiny_model: Path) -> None:
    found = superllama.plan(tiny_model, mem_budget="1GiB", n_ctx=64)
    said = shown(found)
    for words in (tiny_model.name, "asked", "least", "100 %", "1 GiB", "tokens/s", "64 tokens of context"):
        assert words in said
    assert found.asked.tokens_per_s is not None and number(found.asked.tokens_per_s) in said
    little = superllama.plan(tiny_model, mem_budget="1MiB", n_ctx=64)
    assert "too little" in shown(little)
