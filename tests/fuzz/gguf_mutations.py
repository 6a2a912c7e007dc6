"""What can be wrong with a model file: one change at a time, made by a generator of random numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

from gguf_parts import ARRAY, BOOL, F32, F64, I32, INTEGERS, N_TYPES, STRING, U32, Parts, Tensor, Value

EDGES = (0, 1, 2, 3, 4, 5, 7, 8, 15, 16, 31, 32, 33, 63, 64, 100, 127, 128, 255, 256, 511, 512, 513, 1000, 1024, 1025,
         4096, 65535, 65536, 1 << 20, 1 << 24, (1 << 31) - 1, 1 << 31, (1 << 32) - 1)  # fmt: skip
REALS = (0.0, -0.0, 1.0, -1.0, 1e-45, 1e-30, 1e-5, 0.5, 2.0, 10000.0, 1e9, 1e20, 3e38, -3e38, float("nan"),
         float("inf"), float("-inf"))  # fmt: skip
TEXTS = (b"", b"\0", b" ", b"a", b"none", b"linear", b"yarn", b"longrope", b"test", b"llama", b"gpt2", b"bert", b"t5",
         b"rwkv", b"plamo2", b"gemma4", b"no_vocab", b"\xff\xfe", b"%s%n", b"x" * 70000)  # fmt: skip
VOCAB = "tokenizer."

Mutation = Callable[[random.Random, Parts, "Corpus"], str]


class Corpus:
    """What mutations take from other files: keys and names of architectures."""

    def __init__(self, files: Sequence[Parts]) -> None:
        self.architectures = sorted({f.architecture for f in files})
        suffixes: dict[str, Value] = {}
        for f in files:
            for v in f.values:
                key = v.key.decode()
                suffixes.setdefault(key.removeprefix(f.architecture + "."), v)
        self.values = [suffixes[k] for k in sorted(suffixes)]
        self.suffixes = sorted(suffixes)


def _said(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else text[:57] + "..."


def _number(rng: random.Random, old: int) -> int:
    near = (old - 1, old + 1, old * 2, old // 2, old * 3, old // 3, old + 8, -old)
    return rng.choice(near) if rng.random() < 0.4 else rng.choice(EDGES)


def _changed(rng: random.Random, type: int, old: Any) -> Any:
    if type == STRING:
        return rng.choice(TEXTS) if rng.random() < 0.7 or not old else old[: rng.randrange(len(old))]
    if type in (F32, F64):
        return rng.choice(REALS) if rng.random() < 0.7 else float(old) * rng.choice((-1, 0.1, 10, 1e6))
    if type == BOOL:
        return rng.choice((0, 1, 1 - int(bool(old)), 2, 255))
    return _number(rng, int(old))


def _default(type: int) -> Any:
    return b"" if type == STRING else 0.0 if type in (F32, F64) else 0


def _converted(value: Any, type: int) -> Any:
    """The same value as another type, where there is such a thing."""
    if type == STRING:
        return value if isinstance(value, bytes) else str(value).encode()
    if isinstance(value, bytes):
        return _default(type)
    if type in (F32, F64):
        return float(value)
    return int(value) if value == value and abs(value) < 2**63 else 0


def _values(parts: Parts, rng: random.Random) -> list[Value]:
    """Hyperparameters more often than the vocabulary, which has as many keys."""
    model = [v for v in parts.values if not v.key.startswith((b"tokenizer.", b"general."))]
    return model if model and rng.random() < 0.8 else parts.values


# ---------------------------------------------------------------- values


def change_scalar(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    v = rng.choice([v for v in _values(parts, rng) if v.type != ARRAY] or parts.values)
    if v.type == ARRAY:
        return change_element(rng, parts, corpus)
    v.value = _changed(rng, v.type, v.value)
    return f"{v.key!r} = {_said(v.value)}"


def change_element(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    v = rng.choice([v for v in _values(parts, rng) if v.type == ARRAY and v.value] or parts.values)
    if v.type != ARRAY or not v.value or v.element is None:
        return "nothing"
    for _ in range(rng.choice((1, 1, 1, 3))):
        i = rng.randrange(min(len(v.value), 8)) if rng.random() < 0.5 else rng.randrange(len(v.value))
        v.value[i] = _changed(rng, v.element, v.value[i])
    return f"{v.key!r}[{i}] = {_said(v.value[i])}"


def change_length(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    v = rng.choice([v for v in parts.values if v.type == ARRAY] or parts.values)
    if v.type != ARRAY or v.element is None:
        return "nothing"
    n = rng.choice((0, 1, len(v.value) - 1, len(v.value) + 1, len(v.value) // 2, len(v.value) * 2, 513))
    old = v.value or [_default(v.element)]
    v.value = [old[i % len(old)] for i in range(max(0, n))]
    return f"{v.key!r} has {n} elements"


def to_array(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    v = rng.choice([v for v in _values(parts, rng) if v.type != ARRAY] or parts.values)
    if v.type == ARRAY:
        return "nothing"
    layers = next((x.value for x in parts.values if x.key.endswith(b".block_count") and x.type == U32), 2)
    n = rng.choice((layers, layers, layers, layers + 1, max(0, layers - 1), 0, 1, 4, 512, 513))
    n = max(0, min(n, 600))
    v.element, v.type, v.value = v.type, ARRAY, [v.value] * n
    if n and rng.random() < 0.7:
        v.value[rng.randrange(n)] = _changed(rng, v.element, v.value[0])
    return f"{v.key!r} is an array of {n}: {_said(v.value[:4])}"


def to_scalar(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    v = rng.choice([v for v in parts.values if v.type == ARRAY and v.value] or parts.values)
    if v.type != ARRAY or not v.value or v.element is None:
        return "nothing"
    v.type, v.value, v.element = v.element, v.value[0], None
    return f"{v.key!r} is the scalar {_said(v.value)}"


def change_type(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    v = rng.choice(_values(parts, rng))
    new = rng.choice((*INTEGERS, F32, F64, BOOL, STRING, 13, 255))
    if v.type == ARRAY:
        v.value = [_converted(x, new) for x in v.value]
        v.element = new
    else:
        v.value, v.type = _converted(v.value, new), new
    return f"{v.key!r} has the type {new}"


def remove(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    v = rng.choice(_values(parts, rng))
    parts.values.remove(v)
    return f"{v.key!r} is missing"


def add(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    """A key that another file has, perhaps with another value."""
    v = rng.choice(corpus.values).copy()
    suffix = corpus.suffixes[corpus.values.index(next(x for x in corpus.values if x.key == v.key))]
    prefix = "" if suffix.startswith(("general.", VOCAB, "xielu.")) else parts.architecture + "."
    v.key = (prefix + suffix).encode()
    if v.type != ARRAY and rng.random() < 0.6:
        v.value = _changed(rng, v.type, v.value)
    parts.values = [x for x in parts.values if x.key != v.key] + [v]
    return f"{v.key!r} = {_said(v.value)} is new"


def swap(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    same = [v for v in parts.values if v.type == U32]
    if len(same) < 2:
        return "nothing"
    a, b = rng.sample(same, 2)
    a.value, b.value = b.value, a.value
    return f"{a.key!r} and {b.key!r} are exchanged"


def repeat(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    v = rng.choice(parts.values).copy()
    parts.values.append(v)
    return f"{v.key!r} is there twice"


def rename(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    v = rng.choice(parts.values)
    old = v.key
    v.key = rng.choice((b"", v.key[:-1], v.key + b"x", v.key + b"\0", rng.choice(parts.values).key))
    return f"{old!r} is called {_said(v.key)}"


def other_architecture(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    """All keys of one architecture under the name of another."""
    old, new = parts.architecture, rng.choice(corpus.architectures)
    for v in parts.values:
        if v.key.startswith(old.encode() + b"."):
            v.key = new.encode() + v.key[len(old) :]
    value = parts.find("general.architecture")
    if value is not None and value.type == STRING:
        value.value = new.encode()
    return f"{old} says it is {new}"


# ---------------------------------------------------------------- vocabulary


def change_tokens(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    tokens = parts.find("tokenizer.ggml.tokens")
    if tokens is None or tokens.type != ARRAY or tokens.element != STRING or not tokens.value:
        return "nothing"
    i, j = rng.randrange(len(tokens.value)), rng.randrange(len(tokens.value))
    new = (b"", tokens.value[j], b"\0", b" ", b"\n", b"\xff", b"[EMPTY_3]", b"<0x0A>", b"<unk>", b"a" * 5000, b"</s>",
           "▁".encode(), b"<|end|>", b"unused")  # fmt: skip
    tokens.value[i] = rng.choice(new)
    return f"token {i} is {_said(tokens.value[i])}"


def change_token_types(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    types = parts.find("tokenizer.ggml.token_type")
    if types is None or types.type != ARRAY or types.element != I32 or not types.value:
        return "nothing"
    kind = rng.choice((0, 1, 2, 3, 4, 5, 6, 7, -1, 255))
    for _ in range(rng.choice((1, 3, len(types.value)))):
        types.value[rng.randrange(len(types.value))] = kind
    return f"tokens have the type {kind}"


def change_merges(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    merges = [rng.choice((b"", b" ", b"a", b"a b", b"ab", b" a", b"a ", b"a b c", b"\xc4\xa0 t", b"\xff \xff"))
              for _ in range(rng.choice((0, 1, 5)))]  # fmt: skip
    parts.set("tokenizer.ggml.merges", ARRAY, merges, STRING)
    return f"merges are {merges}"


def change_special(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    name = rng.choice(("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "fim_pre", "fim_pad"))
    parts.set(f"tokenizer.ggml.{name}_token_id", U32, rng.choice(EDGES))
    flag = rng.choice(("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix"))
    parts.set(f"tokenizer.ggml.{flag}", BOOL, rng.choice((0, 1)))
    return f"{name} and {flag} are {parts.values[-2].value} and {parts.values[-1].value}"


def change_charsmap(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    n = rng.choice((0, 3, 4, 5, 64, 2052))
    blob = rng.choice((0, 1, 16, 1024, 2**32 - 1, max(0, n - 8)))
    data = list(blob.to_bytes(4, "little"))[:n] + [rng.choice((0, 97, 255, rng.randrange(256))) for _ in range(n - 4)]
    parts.set("tokenizer.ggml.precompiled_charsmap", ARRAY, data, rng.choice((0, 1)))
    parts.set("tokenizer.ggml.model", STRING, b"t5")
    return f"a charsmap of {n} bytes, {blob} of them its table"


# ---------------------------------------------------------------- tensors


def _tensor(rng: random.Random, parts: Parts) -> Tensor:
    return rng.choice(parts.tensors)


def change_shape(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    t = _tensor(rng, parts)
    how = rng.randrange(5)
    if how == 0:
        t.shape.reverse()
    elif how == 1 and t.shape:
        t.shape[rng.randrange(len(t.shape))] = rng.choice((*EDGES, 2**62, 2**63, 2**64 - 1))
    elif how == 2 and t.shape:
        i = rng.randrange(len(t.shape))
        t.shape[i] = max(0, _number(rng, t.shape[i]))
    elif how == 3:
        t.shape.append(rng.choice((0, 1, 2)))
    elif t.shape:
        t.shape.pop()
    if rng.random() < 0.9:
        t.fit()
    return f"{t.name!r} has the shape {t.shape}"


def change_tensor_type(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    t = _tensor(rng, parts)
    t.type = rng.choice((*range(N_TYPES), N_TYPES, 1000, 2**31, 2**32 - 1))
    if rng.random() < 0.95:
        t.fit()
    return f"{t.name!r} has the type {t.type}"


def change_tensor_types(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    """All tensors of one kind, as a quantisation does it."""
    t = _tensor(rng, parts)
    kind, new = t.name.split(b".", 2)[-1], rng.choice(range(N_TYPES))
    for other in parts.tensors:
        if other.name.endswith(kind):
            other.type = new
            other.fit()
    return f"all {kind!r} have the type {new}"


def change_offset(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    t = _tensor(rng, parts)
    t.offset = rng.choice((0, 1, 31, 32, 4096, 2**31, 2**40, 2**63, 2**64 - 32, 2**64 - 1))
    return f"{t.name!r} is at {t.offset}"


def rename_tensor(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    t = _tensor(rng, parts)
    old = t.name
    other = _tensor(rng, parts).name
    t.name = rng.choice((b"", other, old + b"x", b"x" * 63, b"x" * 64, b"x" * 300, old.replace(b"blk.0", b"blk.1"),
                         old.replace(b"blk.", b"blk.-"), old.replace(b"weight", b"bias"),
                         old.replace(b"weight", b"scale"), b"rope_freqs.weight", b"output.weight"))  # fmt: skip
    return f"{old!r} is called {_said(t.name)}"


def remove_tensor(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    t = _tensor(rng, parts)
    parts.tensors.remove(t)
    return f"{t.name!r} is missing"


def add_tensor(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    """One that is optional, of a shape of others."""
    layer = f"blk.{rng.randrange(2)}."
    name = rng.choice(("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight", "output.weight",
                       "output.bias", "position_embd.weight", "cls.weight", "cls.output.weight", layer + "attn_q.bias",
                       layer + "attn_qkv.weight", layer + "attn_q_norm.weight", layer + "attn_k_norm.weight",
                       layer + "attn_sinks.weight", layer + "ffn_gate_inp.weight", layer + "exp_probs_b.bias",
                       layer + "ffn_gate_exps.weight", layer + "attn_q.scale", layer + "attn_rot_embd",
                       layer + "rope_freqs.weight", layer + "ffn_gate.weight"))  # fmt: skip
    t = _tensor(rng, parts).copy()
    t.name = name.encode()
    if rng.random() < 0.6:
        t.shape = [rng.choice((1, 2, 4, 16, 32, 64, 128, 256, 384))]
    t.fit()
    parts.tensors.append(t)
    return f"{name} is new, of {t.shape}"


def numbers_that_are_none(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    t = _tensor(rng, parts)
    bits = rng.choice(
        (b"\0\0\xc0\x7f", b"\0\0\x80\x7f", b"\0\0\x80\xff", b"\xff\xff\x7f\x7f", b"\0\0\0\0", b"\xff" * 4)
    )
    t.data = (bits * (len(t.data) // 4 + 1))[: len(t.data)]
    return f"{t.name!r} is full of {bits.hex()}"


# ---------------------------------------------------------------- the file


def change_header(rng: random.Random, parts: Parts, corpus: Corpus) -> str:
    what = rng.randrange(5)
    n = rng.choice((0, 1, 2, 2**31, 2**40, 2**60, 2**63, 2**64 - 1))
    if what == 0:
        parts.version = rng.choice((0, 1, 2, 4, 0x03000000, 2**32 - 1))
    elif what == 1:
        parts.n_values = rng.choice((n, len(parts.values) - 1, len(parts.values) + 1))
    elif what == 2:
        parts.n_tensors = rng.choice((n, len(parts.tensors) - 1, len(parts.tensors) + 1))
    elif what == 3:
        parts.set("general.alignment", U32, rng.choice((0, 1, 2, 3, 8, 16, 33, 64, 4096, 65536, 2**31, 2**32 - 1)))
    else:
        v = rng.choice([v for v in parts.values if v.type == ARRAY] or parts.values)
        v.count = rng.choice((n, 2**30, 2**30 + 1, 2**61))
    return "a number of the header"


COMMON: tuple[Mutation, ...] = (change_scalar,) * 10 + (to_array,) * 4 + (change_element,) * 3 + (add,) * 4
MUTATIONS: tuple[Mutation, ...] = (
    *COMMON, change_length, to_scalar, change_type, change_type, remove, remove, swap, swap, repeat, rename,
    other_architecture, change_tokens, change_token_types, change_merges, change_special, change_charsmap,
    change_shape, change_shape, change_shape, change_tensor_type, change_tensor_type, change_tensor_types,
    change_offset, rename_tensor, remove_tensor, add_tensor, add_tensor, numbers_that_are_none, change_header,
)  # fmt: skip


def mutated(rng: random.Random, parts: Parts, corpus: Corpus) -> tuple[Parts, list[str]]:
    """A copy with one to three changes, and what they are."""
    copy = parts.copy()
    notes = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        if copy.tensors and copy.values:
            notes.append(rng.choice(MUTATIONS)(rng, copy, corpus))
    return copy, notes


def damaged(rng: random.Random, data: bytes, head: int) -> tuple[bytes, str]:
    """The bytes of a file with some of its first `head` changed, or cut off."""
    if rng.random() < 0.3:
        n = rng.choice((rng.randrange(len(data)), rng.randrange(head)))
        return data[:n], f"cut off at {n}"
    changed = bytearray(data)
    places = [rng.randrange(head) for _ in range(rng.choice((1, 1, 2, 8)))]
    for i in places:
        changed[i] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, changed[i] ^ (1 << rng.randrange(8))))
    return bytes(changed), f"bytes at {places[:3]}"
