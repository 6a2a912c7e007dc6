"""Malformed states of contexts and sequences, and files of slots: each is an error that gives a reason, or can be gone
on with; a good state afterwards is what it was.

    python tests/fuzz/fuzz_states.py --minutes 60           # as long as that, from seed 1
    python tests/fuzz/fuzz_states.py --seed 7 --only 1234   # one state again

States of Python have a checksum, which most of the malformed ones have right: what is behind it shall be tried.
"""

from __future__ import annotations

import contextlib
import json
import random
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from json_mutations import dumped
from native_build import arch_models
from rounds import Isolated, Outcome, Say, command_line, generator
from served import Served, post
from serving import HttpServer

import superllama
from superllama._states import LENGTH, MAGIC, NO_SUM, ONE, SESSION, WHOLE, _summed

# Of each way to keep what was read: all of it, in pages, transposed, the last tokens, a state, and mixtures of them.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("llama-dense", {}),
    "unified": ("llama-dense", {"kv_unified": True}),
    "paged": ("llama-dense", {"kv_budget": "1MiB", "kv_page_size": 16}),
    "transposed": ("llama-dense", {"flash_attn": "off"}),
    "quantized": ("llama-dense", {"type_k": "q8_0", "type_v": "q8_0"}),
    "positions in a plane": ("qwen2vl-dense", {}),
    "windows": ("gemma3-dense", {"swa_full": False}),
    "windows, whole": ("gpt-oss-moe", {"swa_full": True}),
    "recurrent": ("mamba-dense", {}),
    "hybrid": ("lfm2-dense", {}),
    "hybrid, unified": ("falcon-h1-dense", {"kv_unified": True}),
    "hybrid with an index": ("qwen4exp-moe", {}),
    "chosen blocks": ("minimax-m3-moe", {}),
    "chosen tokens": ("glm-dsa-moe", {}),
    "compressed": ("deepseek4-moe", {}),
}
SERVED = ("llama-dense", "gemma3-dense", "mamba-dense", "lfm2-dense")
MODELS = sorted({model for model, _ in KINDS.values()} | set(SERVED))
CONTEXT = {"n_ctx": 384, "n_seq_max": 3, "n_batch": 64, "n_ubatch": 64, "n_threads": 1}

WORDS = (0, 1, 2, 3, 4, 5, 31, 32, 33, 127, 128, 129, 255, 256, 257, 383, 384, 385, 511, 512, 4096, 65536, 2**24, 2**30,
         2**31 - 2, 2**31 - 1, 2**31, 2**31 + 1, 2**32 - 2, 2**32 - 1)  # fmt: skip
NAN = struct.pack("<I", 0x7FC00000)
BITS = (NAN, struct.pack("<I", 0x7F800000), b"\0\x7e" * 2, b"\xff" * 4, b"\0" * 4, b"\xff\x7b" * 2, b"\xff\xff\x7f\x7f")


# ---------------------------------------------------------------- what is wrong with the library's data


def small_words(data: bytes) -> list[int]:
    """Where there may be counts, positions, types and sizes: words of four bytes that are small numbers."""
    heads = list(range(min(len(data) - 4, 160)))
    return heads + [
        i
        for i in range(160, len(data) - 4)
        if data[i + 2 : i + 4] == b"\0\0" and 0 < data[i] + 256 * data[i + 1] < 5000
    ]


def malformed(rng: random.Random, data: bytes, words: list[int], others: list[bytes]) -> tuple[bytes, str]:
    changed = bytearray(data)
    at, other, kind = rng.randrange(len(data)), rng.choice(others), rng.randrange(16)
    n = rng.choice((1, 4, 8, 64, 1024, len(data) // 3))
    if kind < 7:
        notes = []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            at = rng.choice(words[:160] if rng.random() < 0.5 else words)
            (old,) = struct.unpack_from("<I", changed, at)
            new = (
                rng.choice((rng.choice(WORDS), old + rng.choice((-1, 1, 2, -2, 100)), old ^ (1 << rng.randrange(32))))
                % 2**32
            )
            struct.pack_into("<I", changed, at, new)
            notes.append(f"{old} at {at} is {new}")
        return bytes(changed), ", ".join(notes)
    if kind < 9:
        for _ in range(rng.choice((1, 1, 5, 50))):
            changed[rng.randrange(rng.choice((200, len(data))))] = rng.randrange(256)
        return bytes(changed), "other bytes"
    if kind < 10:
        return data[:at], f"cut off at {at}"
    if kind < 11:
        return data + rng.choice((b"\0" * n, other[:n], data)), "with something behind it"
    if kind < 12:
        return data[:at] + other[at:], f"another one from {at} on"
    if kind < 13:
        return data[:at] + data[at + n :], f"without {n} bytes at {at}"
    if kind < 14:
        return data[: at + n] + data[at:], f"{n} bytes twice at {at}"
    if kind < 15:
        bits = rng.choice(BITS)
        changed[at : at + n] = (bits * (n // 4 + 1))[: len(changed[at : at + n])]
        return bytes(changed), f"{n} bytes of {bits.hex()} at {at}"
    return other, "another one"


def header(rng: random.Random, facts: dict[str, Any]) -> tuple[bytes, str]:
    """The header of a state, with something that does not belong there."""
    n: Any = rng.choice((*WORDS, -1, -5, 10**12, 2**63, 1.5, None, True, "a", [], {}))
    key = rng.choice((*facts, "pending", "first", "seq", "new"))
    value = n
    if key in ("pending", "first") and rng.random() < 0.8:
        value = [[rng.choice((0, 1, 2, 3, n)), rng.choice((5, 20, n))] for _ in range(rng.choice((1, 2, 5000)))]
    odd = {**facts, key: value}
    if rng.random() < 0.1:
        del odd[key]
    text = dumped(odd)
    if rng.random() < 0.1:
        text = rng.choice(
            (b"[]", b"{}", b"1", b"", b"\xff", b'{"seq": ' + b"[" * 10**5, text[:-5], text[:-1] + b" " * 10**6 + b"}")
        )
    return text, f"header with {key} = {str(value)[:50]}"


def sealed(facts: bytes, data: bytes, seq: int | None, as_file: bool) -> bytes:
    """A state as Context.state_save(), or state_save_file(), makes it."""
    text = facts[:-1] + b", " + NO_SUM + b"}"
    text += b" " * (-len(text) % 4)
    text = _summed(text, zlib.crc32(data, zlib.crc32(text)))
    start = (
        SESSION.pack(*(WHOLE if seq is None else ONE), len(text) // 4) if as_file else MAGIC + LENGTH.pack(len(text))
    )
    return start + text + data


# ---------------------------------------------------------------- contexts


class Held:
    """A context, and good states of it."""

    def __init__(self, model: superllama.Model, options: dict[str, Any]) -> None:
        self.ctx = superllama.Context(model, **CONTEXT, **options)
        self.tokens = [5 + i * i % (model.n_vocab - 5) for i in range(50)]
        self.ctx.decode(self.tokens, seq=0)
        self.ctx.decode(self.tokens[:7], seq=2)
        for seq in (0, 2):
            list(self.ctx.generate(self.tokens[:2], seq=seq, keep=True, max_tokens=1, ignore_eos=True, temperature=0))
        self.good = self.ctx.state_save()
        self.seqs = (None, None, 0, 0, 2)
        self.parts = {seq: self._parted(self.ctx.state_save(seq)) for seq in set(self.seqs)}
        self.words = {seq: small_words(data) for seq, (_, data) in self.parts.items()}
        self.expected = self.control()

    def _parted(self, state: bytes) -> tuple[dict[str, Any], bytes]:
        begin = len(MAGIC) + LENGTH.size
        end = begin + LENGTH.unpack_from(state, len(MAGIC))[0]
        facts = json.loads(state[begin:end])
        del facts["crc32"]
        return facts, state[end:]

    def control(self) -> tuple[bytes, bytes]:
        """What comes after a good state, and after nothing."""
        self.ctx.state_load(self.good)
        self.ctx.decode([7])
        loaded = self.ctx.logits().tobytes()
        self.ctx.clear()
        self.ctx.decode(self.tokens[:5], seq=1)
        return loaded, self.ctx.logits().tobytes()

    def use(self, rng: random.Random) -> None:
        """All that can be done with what was taken; it may fail with an error."""
        c, a, b, p = self.ctx, rng.randrange(3), rng.randrange(3), rng.choice((0, 1, 5, 49, 50, 52, 100))
        calls: list[Callable[[], object]] = [
            lambda: c.decode([7], seq=a), lambda: list(c.generate([9], seq=a, keep=True, max_tokens=2)),
            lambda: c.decode(self.tokens, seq=b), lambda: c.seq_copy(a, b), lambda: c.seq_remove(a, p),
            lambda: c.seq_remove(a, 0, p), lambda: c.seq_shift(a, rng.choice((-1, 5, -p, 300))), lambda: c.seq_keep(b),
            lambda: c.state_load(c.state_save()), lambda: c.state_load(c.state_save(a), b), lambda: c.kv_pages(),
            lambda: (c.seq_pos_min(a), c.seq_pos_max(a)), lambda: c.prefetch(a),
        ]  # fmt: skip
        for call in rng.sample(calls, 5):
            with contextlib.suppress(superllama.Error):
                call()


class States:
    """Cases in contexts of this process."""

    def __init__(self, files: dict[str, Path], folder: Path) -> None:
        self._file = folder / "state"
        models = {name: superllama.Model(files[name]) for name in {name for name, _ in KINDS.values()}}
        self._held = {kind: Held(models[name], options) for kind, (name, options) in KINDS.items()}

    def __call__(self, rng: random.Random, say: Say) -> tuple[str, str]:
        kind = rng.choice(list(KINDS))
        held = self._held[kind]
        seq = rng.choice(held.seqs)
        facts, data = held.parts[seq]
        others = [data for _, data in held.parts.values()] + [h.parts[seq][1] for h in self._held.values()]
        state, as_file, note = self._state(rng, facts, data, held.words[seq], others, seq)
        target = None if seq is None else rng.choice((0, 1, 2))
        if rng.random() < 0.05:
            target = rng.choice((None, 0, 3, -1))
        say(f"{kind}, seq={seq} as {target}{' by a file' * as_file}: {note}")
        if rng.random() < 0.5:
            held.ctx.state_load(held.good)
        try:
            if as_file:
                self._file.write_bytes(state)
                held.ctx.state_load_file(self._file, target)
            else:
                held.ctx.state_load(state, target)
            answer = "ok", ""
        except superllama.Error as e:
            answer = ("refused" if str(e) and "no reason" not in str(e) else "refused without a reason"), str(e)
        held.use(rng)
        if (found := held.control()) != held.expected:
            which = [same for same, a, b in zip(("loaded", "anew"), found, held.expected, strict=True) if a != b]
            return "other logits since", " and ".join(which)
        return answer

    def _state(
        self,
        rng: random.Random,
        facts: dict[str, Any],
        data: bytes,
        words: list[int],
        others: list[bytes],
        seq: int | None,
    ) -> tuple[bytes, bool, str]:
        as_file, kind, text = rng.random() < 0.5, rng.randrange(20), dumped(facts)
        if kind == 0:
            return sealed(text, data, seq, as_file), as_file, "as it was"
        if kind < 4:
            text, note = header(rng, facts)
            return sealed(text, data, seq, as_file), as_file, note
        if kind == 4:  # the checksum is wrong
            state, note = malformed(rng, sealed(text, data, seq, as_file), words, others)
            return state, as_file, f"{note}, not sealed"
        data, note = malformed(rng, data, words, others)
        return sealed(text, data, seq, as_file), as_file, note


# ---------------------------------------------------------------- slots


PROMPT = [5 + i * i % 90 for i in range(60)]


class Slots:
    """Cases in servers, which read files of slots."""

    def __init__(self, seed: int, models: dict[str, Path], folder: Path) -> None:
        self.seed = seed
        self._folder = folder / "slots"
        self._folder.mkdir()
        flags = ["-np", 2, "-c", 512, "--ctx-checkpoints", 3, "-b", 32, "-ub", 32, "--cache-ram", 0]
        flags += ["--slot-save-path", self._folder]
        self._served = {name: Served(folder, self._control, models[name], *flags) for name in SERVED}
        self._good: dict[str, tuple[bytes, list[int]]] = {}

    def _control(self, server: HttpServer) -> object:
        answers = []
        for body in ({"prompt": PROMPT[:9], "cache_prompt": False}, {"prompt": [9, 8], "cache_prompt": False}):
            status, answer = server.request(
                "/completion", {"n_predict": 2, "temperature": 0, "return_tokens": True, **body}
            )
            answers.append((status, answer.get("tokens", answer)))
        return answers

    def _file(self, name: str) -> tuple[bytes, list[int]]:
        """A file of a slot that holds the prompt, and where it has numbers."""
        if name not in self._good:
            server = self._served[name].start()
            for n in (30, len(PROMPT)):
                server.complete(PROMPT[:n], n_predict=1, id_slot=0)
            assert server.request("/slots/0?action=save", {"filename": "good"})[0] == 200
            data = (self._folder / "good").read_bytes()
            self._good[name] = data, small_words(data)
        return self._good[name]

    def run(self, number: int) -> Outcome:
        rng = generator(self.seed, number)
        name = rng.choice(SERVED)
        data, words = self._file(name)
        data, note = malformed(rng, data, words, [self._file(other)[0] for other in SERVED])
        (self._folder / "bad").write_bytes(data)
        slot = rng.randrange(2)
        what = f"{name}, slot {slot}: {note}"
        outcome = self._served[name].ask(number, what, post(f"/slots/{slot}?action=restore", b'{"filename": "bad"}'))
        if outcome.verdict == "ok":  # it is gone on with
            prompt = PROMPT[: rng.choice((10, 30, 40, len(PROMPT)))] + [7] * rng.choice((0, 1, 20))
            body = json.dumps({"prompt": prompt, "n_predict": 3, "id_slot": slot, "temperature": 0}).encode()
            after = self._served[name].ask(number, f"{what}, gone on with", post("/completion", body))
            return after if after.wrong else outcome
        return outcome

    def close(self) -> None:
        for served in self._served.values():
            served.close()


class Fuzzer:
    """Every fourth state is a slot's."""

    def __init__(self, seed: int, folder: Path) -> None:
        models = arch_models(folder, f"^({'|'.join(sorted({m.rpartition('-')[0] for m in MODELS}))})$")
        self._states = Isolated(seed, folder, States, models, folder)
        self._slots = Slots(seed, models, folder)

    def run(self, number: int) -> Outcome:
        return self._slots.run(number) if number % 4 == 3 else self._states.run(number)

    def close(self) -> None:
        self._states.close()
        self._slots.close()


if __name__ == "__main__":
    sys.exit(command_line(__doc__, Fuzzer))
