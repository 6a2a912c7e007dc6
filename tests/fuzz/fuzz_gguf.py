"""Malformed model files: every one is an error, or a model that loads and decodes. Never a signal, a hang, a giant.

    python tests/fuzz/fuzz_gguf.py --minutes 60                          # as long as that, from seed 1
    python tests/fuzz/fuzz_gguf.py --seed 7 --only 1234 --keep folder    # one case again, and the file is kept there

Case number N of a seed is always the same file. What ends wrong is printed with its number and what was changed.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_model as tiny
from gguf_mutations import Corpus, damaged, mutated
from gguf_parts import ARRAY, BOOL, F32, I32, STRING, U32, Parts, read, write
from native_build import arch_models, native_programs
from rounds import Outcome, command_line, generator

ARCHITECTURES = (
    "llama-dense", "llama-moe", "llama4-moe", "qwen2-dense", "qwen2moe-moe", "qwen2vl-dense", "qwen3next-moe",
    "qwen35-dense", "gpt2-dense", "starcoder-dense", "bloom-dense", "mpt-dense", "gemma2-dense", "gemma3-dense",
    "deepseek-moe", "mistral4-moe", "kimi-linear-moe", "kimi-k3-moe", "bailingmoe3-moe", "mamba-dense", "mamba2-dense",
    "falcon-h1-dense", "jamba-dense", "granitehybrid-dense", "nemotron_h-dense", "plamo2-dense", "lfm2-dense",
    "lfm2moe-moe", "gpt-oss-moe", "laguna-moe", "grovemoe-moe", "minimax-01-moe", "minimax-m3-moe", "hrm_text-dense",
    "stablelm-dense", "glm4-dense", "cohere2-dense", "phi3-dense", "ernie4_5-moe-moe", "k2-horizon-moe",
)  # fmt: skip
MODES = ("plain",) * 7 + ("dynamic", "plan", "vocab")
MEMORY_MIB = 1500  # more is a giant: the largest of the files has 14 MB


# ---------------------------------------------------------------- files to begin with


def _vocabulary(kind: str, n: int) -> tuple[list[str], list[int]]:
    """Tokens and types of a tokenizer that knows letters."""
    special = {"gpt2": ["<|end|>"], "t5": ["<pad>", "</s>", "<unk>", "▁"], "rwkv": ["<s>", "\\n"]}[kind]
    space = {"gpt2": ["Ġ", "Ċ", "Ġt", "he"], "t5": ["▁t", "he"], "rwkv": [" ", " t", "he"]}[kind]
    letters = [chr(c) for c in range(33, 127) if chr(c) not in "\\'"]
    tokens = [*special, *space, *letters]
    tokens = (tokens + [f"[{i}]" for i in range(n)])[:n]
    return tokens, [3] * len(special) + [1] * (n - len(special))


def give_vocabulary(parts: Parts, kind: str) -> None:
    """In place of the dummy vocabulary that a tiny model comes with, one of the same length."""
    old = parts.find("tokenizer.ggml.tokens")
    assert old is not None
    tokens, types = _vocabulary(kind, len(old.value))
    parts.set("tokenizer.ggml.model", STRING, kind.encode())
    parts.set("tokenizer.ggml.tokens", ARRAY, [t.encode() for t in tokens], STRING)
    parts.set("tokenizer.ggml.token_type", ARRAY, types, I32)
    parts.set("tokenizer.ggml.scores", ARRAY, [-float(i) for i in range(len(tokens))], F32)
    if kind == "gpt2":
        parts.set("tokenizer.ggml.pre", STRING, b"gpt-2")
        parts.set("tokenizer.ggml.merges", ARRAY, ["Ġ t".encode(), b"h e"], STRING)
    parts.set("tokenizer.ggml.bos_token_id", U32, 0)
    parts.set("tokenizer.ggml.eos_token_id", U32, 0)
    parts.set("tokenizer.ggml.add_bos_token", BOOL, 0)


def first_files(folder: Path, models: Mapping[str, Path]) -> dict[str, Parts]:
    """Tiny models of many architectures and tokenizers."""
    files = {name: read(models[name]) for name in ARCHITECTURES}
    kinds = ("gpt2", "t5", "rwkv", None)
    for i, parts in enumerate(files.values()):
        if kind := kinds[i % len(kinds)]:
            give_vocabulary(parts, kind)
    files["tiny-llama"] = read(tiny.write_llama(folder / "tiny-llama.gguf"))
    files["tiny-bert"] = read(tiny.write_bert(folder / "tiny-bert.gguf"))
    return files


# ---------------------------------------------------------------- the process that tries them


class Probe:
    """The program tests/native/fuzz-gguf, which forks for every file."""

    def __init__(self, log: Path) -> None:
        self._log = log.open("wb")
        self._process = subprocess.Popen(
            [native_programs() / "fuzz-gguf"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )

    def ask(self, mode: str, file: Path) -> tuple[str, int, int, str]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{mode} {file}\n".encode())
        self._process.stdin.flush()
        answer = self._process.stdout.readline().decode("utf-8", "replace").split(" ", 3)
        if len(answer) < 4:
            raise RuntimeError(f"fuzz-gguf ended; see {self._log.name}")
        return answer[0], int(answer[1]), int(answer[2]), answer[3].strip()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._log.close()


# ---------------------------------------------------------------- cases


class Fuzzer:
    def __init__(self, seed: int, folder: Path) -> None:
        self.seed = seed
        self.folder = folder
        self.models = arch_models(folder)
        self.files = first_files(folder, self.models)
        self.corpus = Corpus(list(self.files.values()))
        self.heads = {
            name: len(write(dataclasses.replace(p, tensors=[dataclasses.replace(t, data=b"") for t in p.tensors])))
            for name, p in self.files.items()
        }
        self.probe = Probe(folder / "probe.log")

    def case(self, number: int) -> tuple[bytes, str, str]:
        """The bytes of the file, the mode, and what was done."""
        rng = generator(self.seed, number)
        name, mode = rng.choice(sorted(self.files)), rng.choice(MODES)
        if rng.random() < 0.08:
            data, note = damaged(rng, write(self.files[name]), self.heads[name])
            return data, mode, f"{name} {mode}: {note}"
        parts, notes = mutated(rng, self.files[name], self.corpus)
        return write(parts), mode, f"{name} {mode}: {', '.join(notes)}"

    def run(self, number: int) -> Outcome:
        data, mode, what = self.case(number)
        return self._outcome(number, data, mode, what)

    def _outcome(self, number: int, data: bytes, mode: str, what: str) -> Outcome:
        path = self.folder / "case.gguf"
        path.write_bytes(data)
        verdict, memory_mib, milliseconds, reason = self.probe.ask(mode, path)
        verdict = "giant" if memory_mib > MEMORY_MIB else verdict
        return Outcome(number, verdict, memory_mib, milliseconds, reason, what)

    def unchanged(self) -> Iterator[Outcome]:
        """Every first file as it is, in every mode."""
        for name, parts in self.files.items():
            for mode in sorted(set(MODES)):
                yield self._outcome(-1, write(parts), mode, f"{name} {mode}: nothing was changed")

    def left_out(self, every: int) -> Iterator[Outcome]:
        """Every so many of the tensors of all architectures, each left out by itself."""
        number = 0
        for name, path in sorted(self.models.items()):
            parts = read(path)
            for tensor in parts.tensors:
                number += 1
                if number % every == self.seed % every:
                    rest = [t for t in parts.tensors if t is not tensor]
                    data = write(dataclasses.replace(parts, tensors=rest))
                    yield self._outcome(number, data, "plain", f"{name} without {tensor.name!r}")

    def close(self) -> None:
        self.probe.close()


if __name__ == "__main__":
    sys.exit(command_line(__doc__, Fuzzer))
