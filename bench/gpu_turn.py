"""One run on a card, in a process of its own: loads a model, computes prompts, decodes, and says how fast that was.

    python -m bench.gpu_turn SPEC.json

Both stock and superllama run here: without a flag of ours the library is llama.cpp's. Times leave loading out. Tokens
are a fixed sequence, not what the model answers: a random one repeats itself, and asks for the same experts again.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bench.peak import Peak

PROMPT_S = 60.0  # a prompt that would take longer is left out, the shortest not computed a second time
DECODE_S = 20.0  # decoding ends then, however few tokens there are
CONTEXT_MARGIN = 8  # cells
OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True)
class Spec:
    model: str
    prompts: list[int]  # tokens, rising
    tokens: int
    threads: int
    n_ubatch: int
    n_ctx: int
    model_params: dict[str, Any] = field(default_factory=dict)
    context_params: dict[str, Any] = field(default_factory=dict)
    watch: bool = False  # the card's memory, from within: where nothing else can see it
    seconds: float = 0.0  # > 0: decodes so long, with a line for each token
    server: str = ""  # HOST:PORT of an RPC server, which is the card then


@dataclass
class Result:
    first_token_s: float = 0.0  # of the first prompt after loading, the shortest
    prompt: dict[str, float] = field(default_factory=dict)  # tokens/s by length
    decode: float = 0.0  # tokens/s
    vram_bytes: int = 0  # the most in use; 0 where nobody looked
    link_bytes: float | None = None  # of a token, as the next ones; None for stock
    device_hits: float | None = None  # experts that were on the card, of a token; None: not counted
    device_misses: float | None = None
    host_misses: float | None = None  # experts that were not in memory either
    error: str = ""  # OUT_OF_MEMORY, or a sentence


def in_use() -> int:
    """Bytes of the first card that its backend shows in use, in this process or by whomever it counts."""
    import superllama

    cards = [d for d in superllama.devices() if d.kind == "gpu" and d.backend != "RPC"]
    return cards[0].memory_total - cards[0].memory_free if cards else 0


class Tokens:
    """A fixed sequence over the vocabulary, as tests/native/probe.cpp has it."""

    def __init__(self, n_vocab: int) -> None:
        self.n_vocab, self.at = n_vocab, 0

    def next(self, n: int) -> list[int]:
        first = self.at
        self.at += n
        return [(i * 7919 + 13) % self.n_vocab for i in range(first, self.at)]


def run(spec: Spec) -> Result:
    import superllama

    if spec.server:
        superllama.add_rpc_server(spec.server)
    watch = Peak(in_use) if spec.watch else None
    out = Result()
    with superllama.Model(spec.model, progress=False, **spec.model_params) as model:
        context_params = {"n_ctx": spec.n_ctx, "n_ubatch": spec.n_ubatch, "n_threads": spec.threads}
        with superllama.Context(model, **context_params, **spec.context_params) as context:
            tokens = Tokens(model.n_vocab)
            if spec.seconds > 0:
                show(context, tokens, spec)
                return out
            shortest, *longer = spec.prompts
            out.first_token_s = compute(context, tokens.next(shortest))
            for n in [*longer, shortest]:  # decoding goes on behind the shortest
                if out.first_token_s * n / shortest < PROMPT_S:
                    context.clear()
                    out.prompt[str(n)] = n / compute(context, tokens.next(n))
            out.prompt.setdefault(str(shortest), shortest / out.first_token_s)
            decode(context, tokens, spec.tokens, out)
    if watch:
        watch.close()
        out.vram_bytes = watch.most
    return out


def compute(context: Any, tokens: list[int]) -> float:
    """Seconds until the logits after the last of them are there."""
    begin = time.perf_counter()
    for first in range(0, len(tokens), context.n_batch):
        context.decode(tokens[first : first + context.n_batch])
    context.logits()
    return time.perf_counter() - begin


def decode(context: Any, tokens: Tokens, n_max: int, out: Result) -> None:
    before = context.metrics()
    begin, n = time.perf_counter(), 0
    while n < n_max and time.perf_counter() - begin < DECODE_S:
        compute(context, tokens.next(1))
        n += 1
    out.decode = n / (time.perf_counter() - begin)
    after = context.metrics()
    if after.devices:
        out.link_bytes = sum(d.bytes_up for d in after.devices) - sum(d.bytes_up for d in before.devices)
        out.link_bytes /= n
        misses = [m.expert_misses + m.expert_guesses_used for m in (before, after)]
        out.host_misses = (misses[1] - misses[0]) / n
    if hasattr(after, "expert_device_hits"):  # where the metrics have them
        guessed = after.expert_device_guesses_used - before.expert_device_guesses_used  # were not there a moment before
        out.device_hits = (after.expert_device_hits - before.expert_device_hits - guessed) / n
        out.device_misses = (after.expert_device_misses - before.expert_device_misses + guessed) / n


def show(context: Any, tokens: Tokens, spec: Spec) -> None:
    """A line for every token: when it was there, and what the model has on devices."""
    compute(context, tokens.next(spec.prompts[0]))
    n, begin = spec.prompts[0], time.monotonic()
    while (now := time.monotonic()) - begin < spec.seconds:
        print(json.dumps([now, context.metrics().vram_own_bytes]), flush=True)
        if n + 1 >= spec.n_ctx:
            context.clear()
            n = 0
        compute(context, tokens.next(1))
        n += 1


def main() -> int:
    spec = Spec(**json.loads(Path(sys.argv[1]).read_text()))
    try:
        result = run(spec)
    except Exception as error:  # whatever ends a run is its result
        result = Result(error=f"{type(error).__name__}: {error}")
    print(json.dumps(asdict(result)), flush=True)
    return 1 if result.error else 0


if __name__ == "__main__":
    sys.exit(main())
