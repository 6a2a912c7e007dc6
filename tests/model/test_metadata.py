"""Malformed metadata of model files: one line that says which key, which value, what is allowed. In plan too."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_parts import ARRAY, BOOL, F32, I32, STRING, U16, U32, Parts, read, write
from running import Runner

from superllama._programs import find_program

Change = Callable[[Parts], None]

# loads every file of argv, with and without dynamic layers, and plans it; prints one list of errors for each
LOAD = """
import json, sys, superllama
from superllama import Model, plan
def error(call):
    try:
        call()
    except superllama.ModelError as e:
        return str(e)
for file in sys.argv[1:]:
    calls = (lambda: Model(file), lambda: Model(file, dynamic_layers=True), lambda: plan(file))
    print(json.dumps([error(call) for call in calls]), flush=True)
"""


def value(key: str, type: int, v: object, element: int | None = None) -> Change:
    return lambda parts: parts.set(key, type, v, element)


def missing(key: str) -> Change:
    def change(parts: Parts) -> None:
        parts.values = [v for v in parts.values if v.key != key.encode()]

    return change


def token(i: int, text: bytes) -> Change:
    def change(parts: Parts) -> None:
        tokens = parts.find("tokenizer.ggml.tokens")
        assert tokens is not None
        tokens.value[i] = text

    return change


def tensor_type(name: str, type: int) -> Change:
    def change(parts: Parts) -> None:
        tensor = next(t for t in parts.tensors if t.name == name.encode())
        tensor.type = type
        tensor.fit()

    return change


nan, inf = float("nan"), float("inf")

# what is changed in a llama of four layers, and what the error says
MALFORMED: list[tuple[Change, str]] = [
    (value("llama.block_count", U32, 0), "llama.block_count is 0: 1 to 512 are allowed"),
    (value("llama.block_count", U32, 2**31), "llama.block_count is 2147483648: 1 to 512 are allowed"),
    (value("llama.block_count", STRING, b"4"), "llama.block_count is str: an unsigned 32-bit integer is expected"),
    (value("llama.block_count", ARRAY, [4], U32), "llama.block_count is an array of 1 u32"),
    (missing("llama.block_count"), "llama.block_count is missing"),
    (value("llama.context_length", U32, 0), "llama.context_length is 0"),
    (value("llama.context_length", U32, 2**32 - 1), "llama.context_length is 4294967295"),
    (value("llama.embedding_length", U32, 0), "llama.embedding_length is 0"),
    (value("llama.nextn_predict_layers", U32, 5), "at most llama.block_count is 4 of them"),
    (value("llama.attention.head_count", U32, 0), "llama.attention.head_count is 0: at least 1 is needed"),
    (value("llama.attention.head_count", ARRAY, [0, 4, 4, 4], U32), "llama.attention.head_count[0] is 0"),
    (value("llama.attention.head_count", ARRAY, [4, 4, 4], U32), "has 3 elements: one for each of 4 layers"),
    (value("llama.attention.head_count", ARRAY, [4, 4, 4, -1], I32), "llama.attention.head_count[3] is -1"),
    (value("llama.attention.head_count_kv", U32, 3), "a multiple of llama.attention.head_count_kv is 3"),
    (value("llama.attention.head_count_kv", ARRAY, [2, 0, 2, 2], U32), "llama.attention.head_count_kv[1] is 0"),
    (
        value("llama.attention.key_length", U32, 8),
        "dimension_count is 16: the size of a head, 8, is expected",
    ),
    (value("llama.attention.value_length", U32, 0), "value_length 0"),
    (value("llama.rope.dimension_count", U32, 15), "rope.dimension_count"),
    (value("llama.expert_used_count", U32, 2), "llama.expert_used_count is 2: at most llama.expert_count is 0"),
    (value("llama.expert_count", U32, 8), "llama.expert_used_count is 0"),
    (value("llama.expert_count", U32, 1025), "llama.expert_count is 1025: 0 to 1024"),
    (value("llama.expert_group_count", U32, 2), "llama.expert_group_count is 2: less than llama.expert_count is 0"),
    (value("llama.attention.layer_norm_rms_epsilon", F32, nan), "layer_norm_rms_epsilon is nan: 0 to 1 are allowed"),
    (value("llama.attention.layer_norm_rms_epsilon", F32, -1e-5), "layer_norm_rms_epsilon is -1e-05"),
    (value("llama.rope.freq_base", F32, nan), "llama.rope.freq_base is nan"),
    (value("llama.rope.freq_base", F32, -1.0), "llama.rope.freq_base is -1"),
    (value("llama.rope.freq_base", F32, 0.0), "llama.rope.freq_base is 0"),
    (value("llama.rope.scaling.factor", F32, inf), "llama.rope.scaling.factor is inf"),
    (value("llama.rope.scaling.type", STRING, b"new"), 'llama.rope.scaling.type is "new": allowed are none, linear'),
    (value("llama.pooling_type", U32, 9), "llama.pooling_type is 9: 0 to 4"),
    (value("tokenizer.ggml.scores", ARRAY, [0.0] * 7, F32), "tokenizer.ggml.scores has 7 elements"),
    (value("tokenizer.ggml.token_type", ARRAY, [1] * 7, I32), "tokenizer.ggml.token_type has 7 elements"),
    (value("tokenizer.ggml.token_type", ARRAY, [1] * 7, U32), "tokenizer.ggml.token_type is an array of 7 u32"),
    (value("tokenizer.ggml.tokens", ARRAY, [], STRING), "tokenizer.ggml.tokens has 0 elements"),
    (value("tokenizer.ggml.merges", ARRAY, [b"ab"], STRING), 'tokenizer.ggml.merges[0] is "ab"'),
    (token(270, b"a"), "every token has a text of its own"),
    (tensor_type("blk.0.attn_q.weight", 26), "tensor blk.0.attn_q.weight has the type i32"),
    (tensor_type("blk.0.attn_norm.weight", 1), "tensor blk.0.attn_norm.weight has the type f16: f32 is expected"),
    (value("general.alignment", U32, 0), "alignment 0 is not a power of 2"),
    (value("general.alignment", U32, 48), "alignment 48 is not a power of 2"),
]


def test_every_kind_is_an_error_with_the_rule(tiny_model: Path, tmp_path: Path, run_python: Runner) -> None:
    whole = read(tiny_model)
    files = []
    for i, (change, _) in enumerate(MALFORMED):
        parts = whole.copy()
        change(parts)
        files.append(tmp_path / f"{i}.gguf")
        files[-1].write_bytes(write(parts))
    done = run_python(LOAD, *files)
    assert done.returncode == 0, done.stderr[-2000:]
    for (_, text), line in zip(MALFORMED, done.stdout.splitlines(), strict=True):
        plain, dynamic, plan = json.loads(line)
        assert plain is not None and text in plain, f"{text!r} is not in {plain!r}"
        assert "\n" not in plain
        assert dynamic is not None and text in dynamic
        assert plan is not None


def test_parts_of_a_split_model_are_checked(tiny_model: Path, tmp_path: Path, run_python: Runner) -> None:
    whole = read(tiny_model)
    half = len(whole.tensors) // 2
    for change, text in (
        (value("split.no", U32, 1), "split"),  # upstream asserts that it has 16 bits
        (value("split.no", U16, 7), "invalid split file idx"),
        (value("split.no", STRING, b"1"), "split"),
    ):
        first, second = whole.copy(), Parts([], [t.copy() for t in whole.tensors[half:]])
        first.tensors = first.tensors[:half]
        first.set("split.no", U16, 0)
        for parts in (first, second):
            parts.set("split.count", U16, 2)
            parts.set("split.tensors.count", I32, len(whole.tensors))
        change(second)
        for i, parts in enumerate((first, second)):
            (tmp_path / f"m-0000{i + 1}-of-00002.gguf").write_bytes(write(parts))
        done = run_python(LOAD, tmp_path / "m-00001-of-00002.gguf")
        assert done.returncode == 0, done.stderr[-2000:]
        assert all(error is not None for error in json.loads(done.stdout)), (text, done.stdout)
        second.set("split.no", U16, 1)
        (tmp_path / "m-00002-of-00002.gguf").write_bytes(write(second))
        done = run_python(LOAD, tmp_path / "m-00001-of-00002.gguf")
        assert json.loads(done.stdout) == [None] * 3, done.stdout


def test_a_text_behind_the_table_of_positions(tiny_bert: Path, run_python: Runner) -> None:
    script = """
import sys, superllama
ctx = superllama.Context(sys.argv[1], n_ctx=512, embeddings=True)
try:
    ctx.embed("a " * 200)
except superllama.Error as e:
    print(e)
print(len(ctx.embed("a b")))
"""
    done = run_python(script, tiny_bert)
    assert done.returncode == 0, done.stderr[-2000:]
    # refused by the context, which is no longer than the table, or else by the library
    assert "the context has 64" in done.stdout or "this model has a table of 64 positions" in done.stdout
    assert done.stdout.endswith("64\n")


def test_a_tokenizer_that_adds_a_token_which_does_not_exist(
    tiny_model: Path, tmp_path: Path, run_python: Runner
) -> None:
    parts = read(tiny_model)
    file = tmp_path / "gpt2.gguf"
    parts.set("tokenizer.ggml.model", STRING, b"gemma4")
    parts.set("tokenizer.ggml.merges", ARRAY, [b"a b"], STRING)
    parts.set("tokenizer.ggml.add_bos_token", BOOL, 1)
    parts.values = [v for v in parts.values if v.key != b"tokenizer.ggml.bos_token_id"]
    file.write_bytes(write(parts))
    done = run_python(LOAD, file)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "try override_kv={'tokenizer.ggml.add_bos_token': False}" in json.loads(done.stdout)[0]


def test_a_program_says_it_and_an_override_is_checked_as_the_file_is(tiny_model: Path) -> None:
    program = find_program("llama-completion")
    for override, text in (
        (
            "llama.block_count=int:0",
            "llama.block_count is 0: 1 to 512 are allowed; give another value to --override-kv",
        ),
        ("llama.rope.freq_base=float:-1", "llama.rope.freq_base is -1"),
    ):
        command = [program, "-m", tiny_model, "-p", "a", "-n", "1", "--no-warmup", "--override-kv", override]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
        assert done.returncode == 1, done.stderr
        assert text in done.stderr + done.stdout


def test_a_program_that_fails_on_a_busy_machine_says_why(tmp_path: Path) -> None:
    """The thread that writes the log is waited for: sixteen programs at once, more than there are cores."""
    command = [find_program("llama-completion"), "-m", tmp_path / "none.gguf", "-p", "a", "--no-warmup"]
    pipes: Any = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for program in [subprocess.Popen(command, **pipes) for _ in range(16)]:
        said, _ = program.communicate(timeout=120)
        assert program.returncode == 1
        assert said.endswith("error: unable to create context\n")


def test_a_factor_without_a_suffix_is_one_in_every_layer(
    architectures: dict[str, Path], tmp_path: Path, run_python: Runner
) -> None:
    parts = read(architectures["plamo2-dense"])
    tensor_type("blk.1.post_ffw_norm", 3)(parts)
    (tmp_path / "m.gguf").write_bytes(write(parts))
    done = run_python(LOAD, tmp_path / "m.gguf")
    assert done.returncode == 0, done.stderr
    assert all("blk.1.post_ffw_norm has the type q4_1: f32 is expected" in why for why in json.loads(done.stdout)[:2])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("falcon-h1-dense", "ssm_conv1d.bias"),
        ("granitehybrid-dense", "ssm_conv1d.bias"),
        ("nemotron_h-dense", "ssm_conv1d.bias"),
        ("glm-dsa-moe", "indexer.attn_k.weight"),
        ("hy_v3-moe", "ffn_gate_up_exps.weight"),
    ],
)
def test_a_tensor_that_only_the_graph_asks_for(
    kind: str, name: str, architectures: dict[str, Path], tmp_path: Path, run_python: Runner
) -> None:
    parts = read(architectures[kind])
    parts.tensors = [t for t in parts.tensors if not (t.name.startswith(b"blk.1.") and t.name.endswith(name.encode()))]
    path = tmp_path / "m.gguf"
    path.write_bytes(write(parts))
    done = run_python(LOAD, path)
    assert done.returncode == 0, done.stderr
    assert all("blk.1." in error and "is missing" in error for error in json.loads(done.stdout))


def test_a_table_that_is_added_as_it_is(tiny_bert: Path, tmp_path: Path, run_python: Runner) -> None:
    parts = read(tiny_bert)
    tensor_type("token_types.weight", 1)(parts)
    path = tmp_path / "m.gguf"
    path.write_bytes(write(parts))
    done = run_python(LOAD, path)
    assert done.returncode == 0, done.stderr
    assert all("token_types.weight has the type f16" in error for error in json.loads(done.stdout))
