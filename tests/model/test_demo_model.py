"""The real model: sensible text, the same from Python as from the programs, chat, and the README's example."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from running import Runner

import superllama
from superllama import Context, Model

PROMPTS = ["The capital of France is", "def fibonacci(n):\n", "Es war einmal ein König, der", "1, 2, 3, 4,"]


@pytest.fixture
def smol(demo: Model) -> Context:
    return Context(demo, n_ctx=1024)


def text_of(ctx: Context, prompt: str, **kwargs: object) -> str:
    return "".join(piece.text for piece in ctx.generate(prompt, **kwargs))  # type: ignore[arg-type]


def test_it_knows_paris(smol: Context) -> None:
    assert "Paris" in text_of(smol, PROMPTS[0], max_tokens=8, temperature=0)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_text_is_that_of_the_program(smol: Context, demo_model: Path, prompt: str) -> None:
    entry = (
        "import sys; from superllama._programs import completion; sys.argv[0] = 'superllama-completion'; completion()"
    )
    options = ["--temp", "0", "-n", "48", "-c", "1024", "-no-cnv", "--no-display-prompt", "--no-warmup"]
    command = [sys.executable, "-c", entry, "-m", str(demo_model), *options, "-p", prompt]
    done = subprocess.run(command, capture_output=True, timeout=300, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr.decode()
    expected = done.stdout.decode().removesuffix(" [end of text]\n\n").rstrip("\n")
    assert expected
    assert text_of(smol, prompt, max_tokens=48, temperature=0).rstrip("\n") == expected


def test_chat_answers(smol: Context, demo: Model) -> None:
    question = "What is the capital of Italy? Answer with one word."
    messages = [{"role": "user", "content": question}]
    pieces = list(smol.chat(messages, temperature=0, max_tokens=40))
    assert "Rome" in "".join(p.text for p in pieces)
    assert "<|im_end|>" not in "".join(p.text for p in pieces)
    prompt = demo.apply_chat_template(messages)
    turns = ("system", "You are a helpful AI assistant named SmolLM, trained by Hugging Face"), ("user", question)
    assert (
        prompt == "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    )
    same = smol.generate(demo.tokenize(prompt, parse_special=True), temperature=0, max_tokens=40)
    assert [p.token for p in same] == [p.token for p in pieces]


def test_chat_ends_by_itself(smol: Context) -> None:
    *_, last = smol.chat([{"role": "user", "content": "Name a colour."}], temperature=0, max_tokens=200)
    assert last.finish_reason == "eos"


def test_streaming_is_valid_text_whatever_is_sampled(smol: Context, demo: Model) -> None:
    for seed in range(3):
        pieces = list(smol.generate("日本の🎉", seed=seed, temperature=1.8, top_k=0, top_p=1, min_p=0, max_tokens=40))
        tokens = [p.token for p in pieces if p.token is not None]
        if pieces[-1].finish_reason == "eos":
            tokens.pop()
        whole = b"".join(demo.token_bytes(t) for t in tokens).decode("utf-8", "replace")
        assert "".join(p.text for p in pieces) == whole


def test_a_grammar_shapes_the_answer(smol: Context) -> None:
    grammar = r'root ::= "{\"city\": \"" [A-Za-z ]+ "\"}"'
    text = text_of(smol, PROMPTS[0], grammar=grammar, temperature=0, max_tokens=24)
    assert re.fullmatch(r'\{"city": "[A-Za-z ]*("\})?', text)


def test_state_of_the_real_model(smol: Context, tmp_path: Path) -> None:
    text_of(smol, PROMPTS[1], max_tokens=10, temperature=0)
    smol.state_save_file(tmp_path / "s", seq=0)
    expected = text_of(smol, "", keep=True, max_tokens=20, temperature=0)
    smol.state_load_file(tmp_path / "s", seq=0)
    assert text_of(smol, "", keep=True, max_tokens=20, temperature=0) == expected


def test_the_example_of_the_readme(run_python: Runner) -> None:
    script = (
        "import superllama; c = superllama.Context(superllama.demo_model()); "
        "print(''.join(p.text for p in c.generate('The capital of France is', max_tokens=8, temperature=0)))"
    )
    done = run_python(script)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert done.stderr == ""


def test_version_of_package_and_library_agree() -> None:
    from superllama._native import version

    assert version() == superllama.__version__
