"""The context that users see: text in, text out, on top of decoding and sequences."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

from ._context_base import Run
from ._errors import CancelledError, ContextError, DecodeError, PromptError
from ._generation import FinishReason, Piece, Summary, TextStream
from ._metrics import Metrics
from ._model import Lora
from ._native import ffi, last_error, lib
from ._params import SamplingParams, merged
from ._sampling import Sampler
from ._sequences import Sequences


class Context(Sequences):
    """A place to compute in: the tokens that a model has read, in one or more sequences, and the logits of the
    latest. Made on a Model, or on the path of one, which then is closed with the context.

    `params` and keyword arguments are the fields of ContextParams; keywords win.

    One thread at a time: a second one gets ConcurrentUseError, from which only cancel() and metrics() are
    exempt. Within a thread, generators on different sequences may take turns.

    Raises: ContextError if the context cannot be made, ModelError if the model cannot be loaded.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._metrics_lock = threading.RLock()  # between close() and metrics(), which any thread may call

    # ---------------------------------------------------------------- generate

    def generate(
        self,
        prompt: str | bytes | Sequence[int],
        params: SamplingParams | None = None,
        *,
        seq: int = 0,
        keep: bool = False,
        **kwargs: Any,
    ) -> Generator[Piece, None, None]:
        """Continue a prompt, piece by piece.

        `prompt` is text, in which names of special tokens such as "<|im_end|>" count as those tokens, or a
        list of tokens. `params` and keyword arguments are the fields of SamplingParams; keywords win. The
        sequence `seq` is emptied first; with keep=True the prompt comes after what is in it, every token
        generated before included, and may be empty.

        Each piece is computed when it is asked for. Leaving the loop, Ctrl-C and cancel() keep the context
        usable, and keep=True goes on from there.

        Raises: PromptError (empty, not UTF-8), PromptTooLongError, GrammarError, at once; DecodeError and
        ConcurrentUseError later too.
        """
        sampling = merged(SamplingParams, params, kwargs)
        self._check_seq(seq)
        self._check_generates()
        cancel_count = self._cancel_count
        with self._use():
            begin = self._next_pos(seq) if keep else 0
            pending = [self._pending[seq]] if keep and seq in self._pending else []
        if isinstance(prompt, str | bytes):
            given = self.model.tokenize(prompt, add_special=not (begin or pending), parse_special=True)
        else:
            given = list(prompt)
        tokens = pending + given
        if not tokens:
            raise PromptError("the prompt is empty, and this model adds no BOS token; give it some text")
        self._check_room(tokens, seq, begin)
        sampler = Sampler(self.model, sampling, self.n_ctx_seq)
        return self._generate(tokens, seq, keep, begin, sampler, cancel_count)

    def _generate(
        self, tokens: list[int], seq: int, keep: bool, begin: int, sampler: Sampler, cancel_count: int
    ) -> Generator[Piece, None, None]:
        params, run = sampler.params, Run()
        stream = TextStream(params.stop)
        clock = _Clock(len(tokens), sampler.seed)
        token: int | None = None
        finish: FinishReason | None = None
        try:
            with self._use(run) as c:
                self._running[seq] = run
                if not keep:
                    lib.llama_memory_seq_rm(self._memory, seq, -1, -1)
                    self._pending.pop(seq, None)
            sampler.accept_prompt(tokens)
            n_pos, part = begin, tokens
            while finish is None:
                # one step: decode the prompt or the token before, sample from its logits at once; what other
                # generators of this thread compute between two steps does not matter then
                try:
                    with self._use(run) as c, clock:
                        if self._running.get(seq) is not run or self._next_pos(seq) != n_pos:
                            raise DecodeError(f"sequence {seq} was changed while it was generating")
                        self._decode(c, part, seq, None, "last", cancel_count)
                        self._pending.pop(seq, None)
                        n_pos += len(part)
                        token = None
                        if clock.n_generated != params.max_tokens:
                            token = sampler.sample(c)
                            self._pending[seq] = token
                            clock.n_generated += 1
                except CancelledError:
                    yield Piece(stream.feed(b"", final=True), None, "cancelled", clock.summary("cancelled"))
                    return
                if token is None:
                    finish = "length"
                elif self.model.is_eog(token):
                    finish = "eos"
                elif clock.n_generated == params.max_tokens or n_pos >= self.n_ctx_seq:
                    finish = "length"
                data = b"" if token is None or finish == "eos" else self.model.token_bytes(token)
                text = stream.feed(data, final=finish is not None)
                if stream.stopped:
                    finish = "stop"
                yield Piece(text, token, finish, clock.summary(finish) if finish else None)
                part = [token] if token is not None else []
        finally:
            sampler.close()
            if self._running.get(seq) is run:
                del self._running[seq]

    def _check_generates(self) -> None:
        with self.model._use() as m:
            by_token = self._memory and not self._at_once and not lib.llama_model_has_encoder(m)
            if not by_token or lib.llama_model_is_diffusion(m):
                raise ContextError(
                    f"{self.model.path.name} ({self.model.description}) does not generate token by token; embed() and "
                    "decode() may be what it is for"
                )

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams | None = None,
        *,
        seq: int = 0,
        template: str | None = None,
        **kwargs: Any,
    ) -> Generator[Piece, None, None]:
        """Answer a conversation: generate() on the prompt that Model.apply_chat_template() makes of it.

        `messages` are like [{"role": "user", "content": "Hello"}]; give the whole conversation each time.

        Raises: TemplateError if the library does not know the model's template, and what generate() raises.
        """
        prompt = self.model.apply_chat_template(messages, template=template)
        tokens = self.model.tokenize(prompt, parse_special=True)
        if len(tokens) > 1 and tokens[0] == tokens[1] == self.model.token_bos:
            del tokens[0]  # the template wrote one, the tokenizer another
        return self.generate(tokens, params, seq=seq, **kwargs)

    # ---------------------------------------------------------------- the rest

    def set_lora(self, adapters: Iterable[tuple[Lora, float]] = ()) -> None:
        """Use these LoRA adapters with these scales, and no others, from the next batch on.

        Raises: ContextError for an adapter of another model.
        """
        chosen = list(adapters)
        for lora, _ in chosen:
            if lora.model is not self.model:
                raise ContextError(f"the adapter {lora.name} was loaded for another model")
        with self._use() as c:
            loras = ffi.new("struct llama_adapter_lora *[]", [lora._c for lora, _ in chosen])
            scales = ffi.new("float[]", [scale for _, scale in chosen])
            if lib.llama_set_adapters_lora(c, loras, len(chosen), scales):
                raise ContextError("the library refuses these adapters")

    def metrics(self) -> Metrics:
        """The metrics line as it would be written now; any thread may ask, also while another one computes."""
        with self._metrics_lock:
            if self.closed:
                raise ContextError("this context is closed")
            size = 4096
            while True:
                buffer = ffi.new("char[]", size)
                n = lib.superllama_metrics_json(self._c, buffer, size)
                if n < 0:
                    raise ContextError(f"no metrics: {last_error()}")
                if n < size:
                    return Metrics.model_validate_json(bytes(ffi.buffer(buffer, n)))
                size = n + 1

    def close(self) -> None:
        """Free the context, and the model if the context loaded it. Closing twice is fine.

        Raises: ConcurrentUseError if another thread is using the context.
        """
        with self._metrics_lock:
            super().close()


class _Clock:
    """Counts tokens and the time that the library takes for them: the first step is the prompt's."""

    def __init__(self, n_prompt: int, seed: int) -> None:
        self.n_prompt = n_prompt
        self.n_generated = 0
        self.seed = seed
        self.steps_s: list[float] = [0.0, 0.0]  # prompt, generation
        self._n_steps = 0
        self._start = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.steps_s[min(self._n_steps, 1)] += time.perf_counter() - self._start
        self._n_steps += 1

    def summary(self, finish: FinishReason) -> Summary:
        prompt_s, generation_s = self.steps_s
        return Summary(
            prompt_tokens=self.n_prompt,
            generated_tokens=self.n_generated,
            prompt_tokens_per_sec=self.n_prompt / prompt_s if prompt_s else 0.0,
            tokens_per_sec=(self._n_steps - 1) / generation_s if generation_s else 0.0,
            finish_reason=finish,
            seed=self.seed,
        )
