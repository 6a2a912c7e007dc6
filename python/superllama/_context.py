"""The context that users see: text in, text out, on top of decoding and sequences."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from typing import Any

from ._errors import CancelledError, ContextError, DecodeError, PromptError
from ._generation import FinishReason, Piece, Summary, TextStream
from ._metrics import Metrics, metrics_of
from ._model import Lora
from ._native import ffi, lib
from ._params import SamplingParams, merged
from ._process import check_process, inherited
from ._sampling import Sampler
from ._scoring import Scoring
from ._text import is_text, token_list

MOST_SCALE = 10_000  # of an adapter; with more come numbers that are none


class Context(Scoring):
    """A place to compute in: the tokens that a model has read, in one or more sequences, and the logits of the
    latest. Made on a Model, or on the path of one, which then is closed with the context.

    `params` and keyword arguments are the fields of ContextParams; keywords win.

    One thread at a time: a call while another thread is in one gets ConcurrentUseError, from which only cancel() and
    metrics() are exempt. Generators on different sequences may take turns, and each may go on in another thread.

    Raises: ContextError if the context cannot be made, ModelError if the model cannot be loaded. In a fork of the
    process that made it, every use of a context raises ForkedError, and so does making one in a fork of a process that
    had one.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._metrics_lock = threading.RLock()  # between close() and metrics(), which any thread may call
        self._running: dict[int, object] = {}  # by sequence: the generator that went on with it last

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
        if is_text(prompt):
            given = self.model.tokenize(prompt, add_special=not (begin or pending), parse_special=True)
        else:
            given = token_list(
                prompt, "a prompt is one text or a list of tokens; messages go to chat(), several prompts one by one"
            )
        tokens = pending + given
        return self._started(tokens, tokens, sampling, seq, begin, cancel_count)

    def _started(
        self, tokens: list[int], seen: list[int], sampling: SamplingParams, seq: int, begin: int, cancel_count: int
    ) -> Generator[Piece, None, None]:
        """Check all that can be wrong, at once. `seen` is what penalties look at."""
        if not tokens:
            raise PromptError("the prompt is empty, and this model adds no BOS token; give it some text")
        self._check_room(tokens, seq, begin)
        sampler = Sampler(self.model, sampling, self.n_ctx_seq)
        sampler.accept_prompt(seen)
        with self._use():
            end = self._next_pos(seq)
        return self._generate(tokens, seq, begin, end, sampler, cancel_count)

    def _generate(
        self, tokens: list[int], seq: int, begin: int, end: int, sampler: Sampler, cancel_count: int
    ) -> Generator[Piece, None, None]:
        params, run = sampler.params, object()
        stream = TextStream(params.stop)
        clock = _Clock(len(tokens), sampler.seed)
        token: int | None = None
        finish: FinishReason | None = None
        try:
            with self._use() as c:
                self._running[seq] = run
                if begin == 0:
                    self._forget(seq)
                elif self._next_pos(seq) == end:
                    self._go_back(c, seq, begin)  # else the first step sees that the sequence was changed
            n_pos, part = begin, tokens
            while finish is None:
                # one step: decode the prompt or the token before, sample from its logits at once; what is computed
                # between two steps, by other generators or by the caller, does not matter then
                try:
                    with self._use() as c, clock:
                        if self._running.get(seq) is not run or self._next_pos(seq) != n_pos:
                            raise DecodeError(f"sequence {seq} was changed while it was generating")
                        wanted = clock.n_generated != params.max_tokens
                        token = self._step(c, part, seq, sampler if wanted else None, cancel_count)
                        n_pos += len(part)
                        clock.n_generated += token is not None
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

    def _step(self, c: Any, part: list[int], seq: int, sampler: Sampler | None, cancel_count: int) -> int | None:
        """Decode, and sample a token that is pending from then on: both, or the sequence and what is pending are as
        they were. Ctrl-C may come anywhere in here."""
        begin, before = self._next_pos(seq), self._pending.get(seq)
        try:
            self._decode(c, part, seq, None, "last", cancel_count)
            token = sampler.sample(c) if sampler else None
            self._pending.pop(seq, None)
            if token is not None:
                self._pending[seq] = token
            return token
        except BaseException:
            if not self._go_back(c, seq, begin):
                self._pending.pop(seq, None)  # it was decoded, and stays so
            elif before is not None:
                self._pending[seq] = before
            raise

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        params: SamplingParams | None = None,
        *,
        seq: int = 0,
        keep: bool = False,
        template: str | None = None,
        **kwargs: Any,
    ) -> Generator[Piece, None, None]:
        """Answer a conversation: generate() on the prompt that Model.apply_chat_template() makes of it.

        `messages` are like [{"role": "user", "content": "Hello"}]; give the whole conversation each time. With
        keep=True, what the sequence holds of it already is not computed again; the rest of the sequence is removed.

        Raises: TemplateError as apply_chat_template() does, and what generate() raises.
        """
        sampling = merged(SamplingParams, params, kwargs)
        self._check_seq(seq)
        self._check_generates()
        cancel_count = self._cancel_count
        prompt = self.model.apply_chat_template(messages, template=template)
        tokens = self.model.tokenize(prompt, parse_special=True)
        if len(tokens) > 1 and tokens[0] == tokens[1] == self.model.token_bos:
            del tokens[0]  # the template wrote one, the tokenizer another
        with self._use():
            begin = self._n_held(seq, tokens) if keep else 0
        return self._started(tokens[begin:], tokens, sampling, seq, begin, cancel_count)

    def _n_held(self, seq: int, tokens: list[int]) -> int:
        """Tokens at the beginning of these that the sequence holds, and after which it can go on: not the last one,
        whose logits are needed."""
        held: Sequence[int] = self._history.get(seq, ())
        n = next((i for i, (a, b) in enumerate(zip(held, tokens, strict=False)) if a != b), min(len(held), len(tokens)))
        n = min(n, len(tokens) - 1)
        next_pos = self._next_pos(seq)
        goes_back = n == next_pos or not (self._has_state or self._lacks_window(seq, n, 0) is not None)
        return n if len(held) == next_pos and goes_back else 0

    # ---------------------------------------------------------------- the rest

    def set_lora(self, adapters: Iterable[tuple[Lora, float]] = ()) -> None:
        """Use these LoRA adapters with these scales, and no others, from the next batch on.

        Raises: ContextError for an adapter of another model, and for a scale that is none.
        """
        hint = "set_lora() takes pairs of an adapter and its scale: [(model.load_lora(path), 1.0)]"
        try:
            chosen = [(lora, float(scale)) for lora, scale in adapters]
        except (TypeError, ValueError):
            raise ContextError(hint) from None
        for lora, scale in chosen:
            if not isinstance(lora, Lora):
                raise ContextError(hint)
            if not abs(scale) <= MOST_SCALE:  # not a number is none either
                raise ContextError(f"the scale of {lora.name} must be between -{MOST_SCALE} and {MOST_SCALE}: {scale}")
            if lora.model is not self.model:
                raise ContextError(f"the adapter {lora.name} was loaded for another model")
        with self._use() as c:
            loras = ffi.new("struct llama_adapter_lora *[]", [lora._c for lora, _ in chosen])
            scales = ffi.new("float[]", [scale for _, scale in chosen])
            if lib.llama_set_adapters_lora(c, loras, len(chosen), scales):
                raise ContextError("the library refuses these adapters")

    def metrics(self) -> Metrics:
        """The metrics line as it would be written now; any thread may ask, also while another one computes."""
        check_process(self._process, "this context")
        with self._metrics_lock:
            if self.closed:
                raise ContextError("this context is closed")
            return metrics_of(self._c)

    def close(self) -> None:
        """Free the context, and the model if the context loaded it. Closing twice is fine.

        Raises: ConcurrentUseError if another thread is using the context.
        """
        if inherited(self._process):
            super().close()  # without the lock, which a thread of the parent may have held
            return
        with self._metrics_lock:
            super().close()

    def _stop(self, seconds: float) -> bool:
        return super()._stop(seconds) and self._metrics_lock.acquire(timeout=seconds)


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
