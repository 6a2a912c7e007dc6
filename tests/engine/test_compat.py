"""superllama.compat.Llama: what code for llama-cpp-python does, as it does it."""

from __future__ import annotations

import ctypes
import json
import math
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from superllama import compat
from superllama.compat import LLAMA_DEFAULT_SEED, Llama, LlamaGrammar


@pytest.fixture(scope="module")
def llama(demo_model: Path) -> Iterator[Llama]:
    with Llama(str(demo_model), n_ctx=512, seed=7) as found:
        yield found


def test_tokens(llama: Llama) -> None:
    text = b"Hello World"
    tokens = llama.tokenize(text)
    assert llama.detokenize(tokens) == text
    special = llama.tokenize(b"<|im_start|>", special=True)
    assert (
        special == [1]
        and llama.detokenize(special) == b""
        and llama.detokenize(special, special=True) == b"<|im_start|>"
    )
    assert llama.detokenize(tokens[1:], prev_tokens=tokens[:1]) == b" World"
    assert llama.token_eos() == 2 and llama.n_ctx() == 512 and llama.n_vocab() == 49152 and llama.n_embd() == 576
    assert llama.metadata["general.architecture"] == "llama"
    assert llama.context_params.n_ctx == 512 and llama.model_params.n_gpu_layers == 0


def test_what_others_look_up_of_the_vocabulary(llama: Llama) -> None:
    text = "Hello World"
    tokenizer = llama.tokenizer()
    tokens = tokenizer.encode(text)
    assert tokens == llama.tokenize(text.encode()) and tokenizer.decode(tokens) == text
    assert tokenizer.tokenize(b"<|im_start|>", special=True) == [1]

    vocabulary = compat.llama_model_get_vocab(llama.model)
    buffer = (ctypes.c_char * 8)()
    n = compat.llama_token_to_piece(vocabulary, tokens[1], buffer, 8, 0, True)
    assert buffer[:n] == b" World"
    n = compat.llama_token_to_piece(vocabulary, tokens[1], buffer, 8, 1, True)
    assert buffer[:n] == b"World"
    assert compat.llama_token_to_piece(vocabulary, tokens[1], buffer, 5, 0, True) == -6
    assert compat.llama_token_to_piece(vocabulary, 1, buffer, 8, 0, False) == 0
    whole = (ctypes.c_char * 32)()
    n = compat.llama_token_to_piece(vocabulary, 1, whole, 32, 0, True)
    assert whole[:n] == b"<|im_start|>"


def test_vocab_only(demo_model: Path) -> None:
    vocabulary = Llama(str(demo_model), vocab_only=True)
    assert vocabulary.detokenize(vocabulary.tokenize(b"a b")) == b"a b"
    with pytest.raises(compat.ModelError, match="vocabulary only"):
        vocabulary("a")
    vocabulary.close()


def test_a_completion_has_the_form_of_openai(llama: Llama) -> None:
    found = llama("The capital of France is", max_tokens=4, temperature=0, echo=True, logprobs=2)
    assert set(found) == {"id", "object", "created", "model", "choices", "usage"}
    assert found["object"] == "text_completion" and found["id"].startswith("cmpl-")
    (choice,) = found["choices"]
    assert choice["text"].startswith("The capital of France is Paris")
    assert choice["finish_reason"] == "length" and choice["index"] == 0
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"].removeprefix("The capital of France is")
    assert logprobs["text_offset"][0] == len("The capital of France is") and len(logprobs["top_logprobs"][0]) == 2
    assert found["usage"] == {"prompt_tokens": 5, "completion_tokens": 4, "total_tokens": 9}


def test_a_stream_is_the_same_in_parts(llama: Llama) -> None:
    whole = llama.create_completion("One, two,", max_tokens=8, temperature=0)
    chunks = list(llama.create_completion("One, two,", max_tokens=8, temperature=0, stream=True))
    assert "".join(c["choices"][0]["text"] for c in chunks) == whole["choices"][0]["text"]
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "length" and len(chunks) > 4


def test_limits_and_ends(llama: Llama) -> None:
    assert llama("One, two, three,", max_tokens=20, temperature=0, stop=[","])["choices"][0]["finish_reason"] == "stop"
    full = llama("word " * 500, max_tokens=None, temperature=0)
    assert full["usage"]["total_tokens"] <= 512 and full["choices"][0]["finish_reason"] == "length"
    assert llama("", max_tokens=2)["usage"]["completion_tokens"] <= 2
    assert llama("a", max_tokens=2, top_k=-1, seed=LLAMA_DEFAULT_SEED)["usage"]["completion_tokens"] <= 2


def test_grammars_and_biases(llama: Llama) -> None:
    grammar = LlamaGrammar.from_string('root ::= "true" | "false"')
    assert llama("Paris is in France:", grammar=grammar)["choices"][0]["text"] in ("true", "false")
    schema = LlamaGrammar.from_json_schema('{"type": "array", "items": {"type": "integer"}, "maxItems": 2}')
    assert isinstance(json.loads(llama("Numbers:", grammar=schema, max_tokens=200)["choices"][0]["text"]), list)
    (yes,) = llama.tokenize(b" yes")
    assert llama("Say:", max_tokens=2, temperature=0, logit_bias={str(yes): 100.0})["choices"][0]["text"] == " yes yes"


def test_random_numbers_go_on_and_come_back(llama: Llama) -> None:
    grammar = LlamaGrammar.from_string("root ::= [0-9]{6}")
    wild: dict[str, Any] = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "grammar": grammar}

    def number() -> str:
        return str(llama("Pick a number:", **wild)["choices"][0]["text"])

    number()  # from now on the prompt is there, and computed the same way
    llama.set_seed(1337)
    state = llama.save_state()
    first, second = number(), number()
    llama.load_state(state)
    assert first != second and number() == first


def test_conversations(llama: Llama) -> None:
    messages = [{"role": "user", "content": "What is a llama?"}]
    found = llama.create_chat_completion(messages, max_tokens=8, temperature=0)
    assert found["object"] == "chat.completion" and found["choices"][0]["message"]["role"] == "assistant"
    text = found["choices"][0]["message"]["content"]
    chunks = list(llama.create_chat_completion(messages, max_tokens=8, temperature=0, stream=True))
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c["choices"]) == text
    form = {
        "type": "json_object",
        "schema": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
    }
    answer = llama.create_chat_completion(messages, response_format=form, max_tokens=200)
    assert set(json.loads(answer["choices"][0]["message"]["content"])) == {"a"}


def test_embeddings(tiny_bert: Path) -> None:
    with Llama(str(tiny_bert), embedding=True, pooling_type=1, n_ctx=0) as llama:
        found = llama.create_embedding(["the", "llama"])
        assert [row["index"] for row in found["data"]] == [0, 1] and found["usage"]["prompt_tokens"] > 2
        one = llama.embed("the")
        assert one == pytest.approx(found["data"][0]["embedding"])
        assert len(llama.embed("q" * 2000)) == llama.n_embd()  # truncated
        assert math.isclose(sum(x * x for x in llama.embed("the", normalize=True)), 1.0, rel_tol=1e-5)


def test_options_become_those_of_the_engine(demo_model: Path) -> None:
    options: dict[str, Any] = {
        "n_threads": 1,
        "type_k": 8,
        "use_mmap": False,
        "rope_freq_base": 10000.0,
        "chat_format": "chatml",
    }
    with Llama(str(demo_model), n_ctx=256, n_parts=-1, f16_kv=True, mem_budget="60%", **options) as llama:
        assert llama("a", max_tokens=1)["usage"]["completion_tokens"] == 1
        again = pickle.loads(pickle.dumps(llama))
        assert again.n_ctx() == llama.n_ctx() == 256
        again.close()
    with pytest.raises(ValueError, match="type_k"):
        Llama(str(demo_model), type_k=99)
    with pytest.raises(TypeError, match="did you mean"):
        Llama(str(demo_model), n_thread=1)


def test_what_is_not_there_says_so(llama: Llama) -> None:
    with pytest.raises(ValueError, match="removed"):
        llama("a", tfs_z=0.5)


def test_it_is_the_module_for_others() -> None:
    script = (
        "import superllama.compat as c; c.install(); c.install(); import llama_cpp; from llama_cpp import Llama; "
        "assert llama_cpp is c and Llama is c.Llama; print('same')"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "same\n", done.stderr
