"""The sampler chain in C that SamplingParams describe; one for each generation."""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ._errors import DecodeError, GrammarError, PromptError
from ._grammar import grammar_sampler
from ._native import ffi, last_error, lib

if TYPE_CHECKING:
    from ._model import Model
    from ._params import SamplingParams

MIN_KEEP = 1  # tokens that top-p, min-p and typical leave at least


class Sampler:
    """Chooses tokens from the logits of a context. `seed` is the one in use, also if it was chosen here.

    Raises: GrammarError for a grammar that cannot be parsed, PromptError for a bias on an unknown token.
    """

    def __init__(self, model: Model, params: SamplingParams, n_ctx: int) -> None:
        self.model = model  # the samplers point into its vocabulary
        self.params = params
        self.seed = secrets.randbelow(2**32 - 1) if params.seed is None else params.seed
        grammar = self._grammar()
        self._chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
        self._constraint = grammar
        self._free = weakref.finalize(self, _free_samplers, self._chain, grammar, model)
        self._free.atexit = False  # a thread that is a daemon may be in it, and its memory goes with the process
        for sampler in self._links(n_ctx):
            lib.llama_sampler_chain_add(self._chain, sampler)

    def _links(self, n_ctx: int) -> list[Any]:
        """In llama.cpp's order. A sampler that is switched off does nothing; the chain takes ownership."""
        p, n_vocab = self.params, self.model.n_vocab
        links = []
        if biases := self._biases():
            links.append(lib.llama_sampler_init_logit_bias(n_vocab, len(biases), ffi.new("llama_logit_bias[]", biases)))
        last_n = n_ctx if p.penalty_last_n < 0 else min(p.penalty_last_n, n_ctx)  # the library allocates so many
        links.append(
            lib.llama_sampler_init_penalties(n_vocab, last_n, p.repeat_penalty, p.frequency_penalty, p.presence_penalty)
        )
        if p.temperature == 0:
            return [*links, lib.llama_sampler_init_greedy()]
        return [
            *links,
            lib.llama_sampler_init_top_k(p.top_k),
            lib.llama_sampler_init_typical(p.typical_p, MIN_KEEP),
            lib.llama_sampler_init_top_p(p.top_p, MIN_KEEP),
            lib.llama_sampler_init_min_p(p.min_p, MIN_KEEP),
            lib.llama_sampler_init_temp(p.temperature),
            lib.llama_sampler_init_dist(self.seed),
        ]

    def _biases(self) -> list[tuple[int, float]]:
        n_vocab = self.model.n_vocab
        for token in self.params.logit_bias:
            if token >= n_vocab:
                raise PromptError(f"logit_bias: token {token} is not in the vocabulary (0 to {n_vocab - 1})")
        biases = dict(self.params.logit_bias)
        if self.params.ignore_eos:
            biases.update({token: float("-inf") for token in range(n_vocab) if self.model.is_eog(token)})
        return list(biases.items())

    def _grammar(self) -> Any:
        if self.params.grammar is None:
            return ffi.NULL
        with self.model._use():
            return grammar_sampler(self.params.grammar, self.model._vocab)

    def accept_prompt(self, tokens: Sequence[int]) -> None:
        """Let the penalties see the end of the prompt."""
        last_n = self.params.penalty_last_n
        for token in tokens if last_n < 0 else tokens[max(0, len(tokens) - last_n) :]:
            lib.llama_sampler_accept(self._chain, token)

    def sample(self, context: Any) -> int:
        """A token from the last logits of the native context; the chain is told that it was taken."""
        token = lib.superllama_py_sample(self._chain, self._constraint, context, -1)
        if token >= 0:
            return int(token)
        if token == lib.SUPERLLAMA_PY_CONTRADICTION:
            raise GrammarError(f"the grammar and the token that was chosen contradict each other: {last_error()}")
        if self._constraint != ffi.NULL:
            raise GrammarError("the grammar allows no further token of this vocabulary; change it so that it can end")
        raise DecodeError("no token could be sampled: the last batch has no logits, or memory is exhausted")

    def close(self) -> None:
        """Free the chain."""
        self._free()


def _free_samplers(chain: Any, grammar: Any, model: Model) -> None:
    lib.llama_sampler_free(chain)
    if grammar != ffi.NULL:
        lib.llama_sampler_free(grammar)
