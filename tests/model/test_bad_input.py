"""Bad input: each a clear exception, and the process lives. What might crash runs in an interpreter of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from running import Runner

import superllama
from superllama import Context, Model
from superllama._native import ffi, last_error, lib

# prints the class and the text of the error that loading argv[1] and generating on it raises
LOAD = """
import sys, superllama
try:
    ctx = superllama.Context(sys.argv[1], n_ctx=256)
    print("loaded", len(list(ctx.generate("the", max_tokens=2))))
except superllama.Error as e:
    print(type(e).__name__, e)
"""


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.01, 0.02, 0.1, 0.5, 0.9, 0.999])
def test_truncated_models(tiny_model: Path, tmp_path: Path, run_python: Runner, share: float) -> None:
    whole = tiny_model.read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(whole[: int(len(whole) * share)])
    done = run_python(LOAD, file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ModelError")
    assert str(file) in done.stdout


def test_a_truncated_real_model(demo_model: Path, tmp_path: Path, run_python: Runner) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes(demo_model.read_bytes()[:50_000_000])
    done = run_python(LOAD, file)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("ModelError")
    assert "not within the file bounds" in done.stdout or "corrupted" in done.stdout


def test_damaged_headers(tiny_model: Path, tmp_path: Path, run_python: Runner) -> None:
    whole = tiny_model.read_bytes()
    rng = np.random.default_rng(5)
    file = tmp_path / "damaged.gguf"
    for _ in range(12):
        damaged = bytearray(whole)
        for at in rng.integers(8, 2000, size=6):
            damaged[at] = rng.integers(256)
        file.write_bytes(damaged)
        done = run_python(LOAD, file)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(("ModelError", "ContextError", "PromptError", "loaded"))


@pytest.mark.parametrize("kind", ["folder", "missing", "empty", "wrong magic"])
def test_paths_that_are_no_model(tmp_path: Path, kind: str) -> None:
    path = {"folder": tmp_path, "missing": tmp_path / "no.gguf"}.get(kind, tmp_path / "x.gguf")
    if kind in ("empty", "wrong magic"):
        path.write_bytes(b"" if kind == "empty" else b"MZ" + bytes(100))
    for load in (Model, Context):
        with pytest.raises(superllama.ModelError, match=str(path)):
            load(path)


def test_an_adapter_is_no_model_and_a_model_no_adapter(
    model: Model, tiny_lora: Path, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(superllama.ModelError):
        Model(tiny_lora)
    with pytest.raises(superllama.ModelError):
        model.load_lora(tiny_model)
    with pytest.raises(superllama.ModelError, match="does not exist"):
        model.load_lora(tmp_path / "no.gguf")


@pytest.mark.parametrize("scale", [3e38, float("nan"), float("inf"), -10001.0])
def test_a_scale_of_which_come_numbers_that_are_none(ctx: Context, tiny_lora: Path, scale: float) -> None:
    lora = ctx.model.load_lora(tiny_lora)
    with pytest.raises(superllama.ContextError, match="scale"):
        ctx.set_lora([(lora, scale)])
    ctx.set_lora([(lora, 10.0)])


def test_an_adapter_of_another_model(tiny_model: Path, tiny_lora: Path, ctx: Context) -> None:
    with Model(tiny_model) as other, pytest.raises(superllama.ContextError, match="another model"):
        ctx.set_lora([(other.load_lora(tiny_lora), 1.0)])


# ---------------------------------------------------------------- contexts


@pytest.mark.parametrize("n_ctx", [10**9, 2**32 - 1])
def test_a_context_that_cannot_fit(tiny_model: Path, demo: Model, run_python: Runner, n_ctx: int) -> None:
    for model in (tiny_model, demo.path):
        script = LOAD.replace("n_ctx=256", f"n_ctx={n_ctx}")
        done = run_python(script, model)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(f"ContextError n_ctx={n_ctx} needs")
        assert "would fit" in done.stdout


@pytest.mark.parametrize("n_ctx", [1, 2, 31, 257])
def test_small_contexts_work(tiny_model: Path, run_python: Runner, n_ctx: int) -> None:
    done = run_python(LOAD.replace("n_ctx=256", f"n_ctx={n_ctx}"), tiny_model)
    assert (done.returncode, done.stdout) == (0, "loaded 2\n"), done.stderr


@pytest.mark.parametrize(
    "params",
    [
        {"n_batch": 1, "n_ubatch": 1},
        {"n_batch": 3, "n_ubatch": 8},
        {"n_seq_max": 256, "n_ctx": 256},
        {"type_k": "q8_0", "type_v": "q8_0"},
        {"type_k": "q4_0", "flash_attn": "off"},
        {"flash_attn": "off", "type_v": "q8_0"},
        {"rope_scaling": "yarn", "rope_freq_scale": 0.25},
        {"embeddings": True, "pooling": "rank"},
        {"embeddings": True, "pooling": "cls", "attention": "non-causal"},
        {"n_threads": 512},
        {"kv_unified": True, "n_seq_max": 3},
        {"swa_full": False},
    ],
)
def test_odd_parameters_work_or_raise(tiny_model: Path, run_python: Runner, params: dict[str, Any]) -> None:
    script = LOAD.replace("n_ctx=256", "**eval(sys.argv[2])")
    done = run_python(script, tiny_model, repr(params))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "loaded 2\n" or done.stdout.startswith("ContextError ")


def test_negative_n_ctx_names_the_field(model: Model) -> None:
    with pytest.raises(ValidationError, match="n_ctx"):
        Context(model, n_ctx=-1)


def test_a_vocabulary_without_weights(tiny_model: Path) -> None:
    with Model(tiny_model, vocab_only=True) as model:
        assert model.detokenize(model.tokenize("the one", add_special=False)).strip() == "the one"
        with pytest.raises(superllama.ContextError, match="vocab_only"):
            Context(model)


# ---------------------------------------------------------------- prompts


@pytest.mark.parametrize("text", [b"\xff\xfe", b"ab\x80", "a\udc80b"])
def test_text_that_is_not_utf8(ctx: Context, text: str | bytes) -> None:
    for use in (ctx.generate, ctx.model.tokenize):
        with pytest.raises(superllama.PromptError, match="UTF-8"):
            use(text)


def test_bytes_that_are_utf8_are_text(ctx: Context) -> None:
    assert ctx.model.tokenize("naïve".encode()) == ctx.model.tokenize("naïve")


def test_empty_prompts(ctx: Context, demo: Model) -> None:
    assert len(list(ctx.generate("", max_tokens=2, ignore_eos=True))) == 2  # BOS is added
    with pytest.raises(superllama.PromptError, match="empty"):
        ctx.generate([])
    with Context(demo, n_ctx=256) as smol, pytest.raises(ValueError, match="empty"):
        smol.generate("")
    with pytest.raises(superllama.PromptError, match="no tokens"):
        ctx.decode([])


def test_a_prompt_longer_than_the_context(ctx: Context) -> None:
    n = len(ctx.model.tokenize("one " * 600))
    with pytest.raises(superllama.PromptTooLongError, match=f"{n} tokens.*{ctx.n_ctx_seq}.*n_ctx={n}") as e:
        ctx.generate("one " * 600)
    assert (e.value.n_tokens, e.value.n_room) == (n, ctx.n_ctx_seq)
    with pytest.raises(superllama.PromptTooLongError):
        ctx.decode([5] * 600)
    ctx.decode([5] * 500)
    with pytest.raises(superllama.PromptTooLongError, match="holds 500 already"):
        ctx.generate([5] * 20, keep=True)
    assert ctx.seq_pos_max() == 499


def test_more_tokens_than_the_shared_cells(model: Model) -> None:
    with Context(model, n_ctx=256, n_seq_max=2, kv_unified=True) as ctx:
        ctx.decode([5] * 200, seq=0)
        with pytest.raises(superllama.DecodeError, match="no room for"):
            ctx.decode([5] * 200, seq=1)
        assert ctx.seq_pos_max(1) == -1
        assert ctx.seq_pos_max(0) == 199
        ctx.decode([5] * 50, seq=1)


@pytest.mark.parametrize("token", [-1, -(2**40), 2**31, 100_000, 303])
def test_tokens_that_do_not_exist(ctx: Context, token: int) -> None:
    for use in (ctx.decode, ctx.generate, ctx.model.detokenize):
        with pytest.raises(superllama.PromptError, match=f"token {token} at position 1"):
            use([5, token])
    with pytest.raises((superllama.PromptError, ValidationError)):
        ctx.generate("the", logit_bias={token: 1.0})


@pytest.mark.parametrize("seq", [-1, 1, 256, 2**40])
def test_sequences_that_do_not_exist(ctx: Context, seq: int) -> None:
    for use in (
        lambda: ctx.decode([5], seq=seq),
        lambda: ctx.generate("x", seq=seq),
        lambda: ctx.seq_pos_max(seq),
        lambda: ctx.seq_remove(seq),
        lambda: ctx.seq_copy(0, seq),
        lambda: ctx.seq_keep(seq),
        lambda: ctx.seq_shift(seq, 1),
        lambda: ctx.state_save(seq),
    ):
        with pytest.raises(superllama.ContextError, match=f"no sequence {seq}"):
            use()


def test_positions_that_do_not_fit(ctx: Context) -> None:
    ctx.decode([5, 6, 7])
    for pos in (-1, 0, 2, 4, 10**12):
        with pytest.raises(superllama.Error, match="goes on at position 3"):
            ctx.decode([5], pos=pos)
    ctx.decode([5], pos=3)
    ctx.clear()
    with pytest.raises(superllama.Error):
        ctx.decode([5], pos=10**12)
    with pytest.raises(superllama.ContextError, match="range"):
        ctx.seq_remove(0, 5, 3)
    with pytest.raises(superllama.ContextError, match="shift"):
        ctx.seq_shift(0, 10**12)


def test_too_many_outputs(model: Model) -> None:
    with (
        Context(model, n_batch=16, n_ubatch=16) as ctx,
        pytest.raises(superllama.PromptTooLongError, match="one batch of 16"),
    ):
        ctx.decode([5] * 17, logits="all")


# ---------------------------------------------------------------- the rest


@pytest.mark.parametrize(
    "grammar", ["not a grammar", 'other ::= "x"', "root ::= root", "root ::= [a-", "root ::= x{2,1"]
)
def test_grammars_that_cannot_be_used(tiny_model: Path, run_python: Runner, grammar: str) -> None:
    script = LOAD.replace("max_tokens=2", "max_tokens=2, grammar=sys.argv[2]")
    done = run_python(script, tiny_model, grammar)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("GrammarError")


@pytest.mark.parametrize(
    "messages",
    [[], [{"role": "user"}], [{"role": "user", "content": 5}], [{"content": "x"}], [{"role": "u\0", "content": "x"}]],
)
def test_messages_that_are_none(demo: Model, messages: Any) -> None:
    with pytest.raises(superllama.TemplateError):
        demo.apply_chat_template(messages)


def test_templates_that_are_missing_or_unknown(model: Model, ctx: Context) -> None:
    messages = [{"role": "user", "content": "x"}]
    with pytest.raises(superllama.TemplateError, match="no chat template"):
        ctx.chat(messages)
    for unknown, says in (("{{ unheard of }}", "cannot be parsed"), ("unheard of", "knows no chat template")):
        with pytest.raises(superllama.TemplateError, match=says):
            model.apply_chat_template(messages, template=unknown)
    assert "x" in model.apply_chat_template(messages, template="chatml")


def test_an_old_error_is_no_reason_of_a_new_call(tiny_model: Path, tmp_path: Path) -> None:
    """Calls of llama.cpp's own interface begin without one, too: a server shows it with their failure."""
    nothing = lib.llama_batch_init(1, 0, 1)  # of no tokens, which is refused without a reason of ours

    def fail() -> None:
        assert lib.superllama_size(b"much", ffi.new("uint64_t *")) < 0 and last_error()

    with Context(tiny_model, n_ctx=64) as ctx:
        fail()
        assert lib.llama_decode(ctx._c, nothing) == -1
        assert last_error() == ""
    lib.llama_batch_free(nothing)
    fail()
    assert lib.llama_model_load_from_file(bytes(tmp_path / "none.gguf"), lib.llama_model_default_params()) == ffi.NULL
    assert last_error() == ""
