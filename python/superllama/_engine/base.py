"""What LLM and AsyncLLM have in common: the engine, its memory, and no waiting."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._budgets import change_budgets
from .._closing import Closing
from .._errors import RequestError, TemplateError
from .._experts import Experts, experts_of
from .._layers import Layer, layers_of, memory_by_tag
from .._metrics import Metrics, metrics_of
from .._progress import LoadProgress, ProgressCallback, bar_for
from . import spans, vectors
from .facts import EngineFacts
from .handle import Handle, Request
from .media import Senses, senses_of
from .options import arguments
from .processors import LogitsProcessor
from .results import Ranked


class Base(Closing):
    """An engine that is made, shows its memory, and is closed."""

    def __init__(
        self, model: str | os.PathLike[str], progress: ProgressCallback | bool | None, options: dict[str, Any]
    ) -> None:
        self.model = os.fspath(model)
        name = Path(self.model).name
        words = arguments(self.model, options)
        bar = bar_for(name) if progress in (None, True) else None
        try:
            self._engine = Handle(words, name, LoadProgress(progress if callable(progress) else bar))
        finally:
            if bar:
                bar.close()

    # ---------------------------------------------------------------- life

    @property
    def closed(self) -> bool:
        """Whether the engine has been stopped."""
        return self._engine.closed

    def close(self) -> None:
        """Cancel what runs, and free the model. Closing twice is fine."""
        self._engine.close()

    def __repr__(self) -> str:
        return f"<superllama.{type(self).__name__} {Path(self.model).name}{' (closed)' if self.closed else ''}>"

    @functools.cached_property
    def facts(self) -> EngineFacts:
        """What the model is: its metadata, sizes, vocabulary; the members of Model that need no weights."""
        return EngineFacts(self._engine)

    @functools.cached_property
    def _props(self) -> Any:
        return self._engine.ask("GET", "/props")

    @property
    def _n_slots(self) -> int:
        return int(self._props["total_slots"])

    def _senses(self) -> Senses:
        return senses_of(self._props)

    @property
    def _template_shows_tools(self) -> bool:
        props = self._props
        return bool(props["chat_template_caps"]["supports_tools"]) or "chat_template_tool_use" in props

    def _submit(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        processors: Sequence[LogitsProcessor] = (),
    ) -> Request:
        """Start a request. Raises: RequestError for more sequences than there are, or a slot that there is not."""
        n, slot = (body or {}).get("n_cmpl", 1), (body or {}).get("id_slot", 0)
        if n != 1 and n not in range(1, self._n_slots + 1):
            raise RequestError(f"n={n!r}: 1 to n_parallel, which is {self._n_slots}: LLM(..., n_parallel=8) has more")
        if slot != 0 and slot >= self._n_slots:
            raise RequestError(f"slot={slot}: there are 0 to {self._n_slots - 1}, for n_parallel={self._n_slots}")
        return self._engine.submit(method, path, body, processors)

    def _span(self, path: str, body: Mapping[str, Any] | None) -> spans.Span | None:
        """Of a request that begins now, where somebody traces."""
        return spans.begun(path, body, Path(self.model).name)

    def _check_scores(self, found: Sequence[Ranked]) -> None:
        """Warns of scores where the model's file names no way to rank."""
        if found and not vectors.says_it_ranks(self.facts.metadata):
            name = Path(self.model).name
            text = f"{name} does not say that it is a reranker (pooling_type, classifier): its scores may mean nothing"
            warnings.warn(text, stacklevel=3)

    def _check_tools(self, request: Mapping[str, Any]) -> None:
        """Raises: TemplateError where the model would not see its tools."""
        if request.get("tools") and request.get("tool_choice") != "none" and not self._template_shows_tools:
            raise TemplateError(
                "this model's chat template shows no tools to it; use a model that was made for them, or "
                "chat_template_file= with a template that has them"
            )

    @property
    def state(self) -> str:
        """What the engine does: "ready", "pausing", "paused", "released" (its memory is given back because nothing was
        asked for, and the next request takes it again), "resuming", or "degraded" (the model cannot be loaded, and the
        engine goes on trying)."""
        return str(self._engine.ask("GET", "/superllama")["state"])

    # ---------------------------------------------------------------- memory

    def layers(self) -> list[Layer]:
        """Where each layer is now; empty where dynamic_layers is off."""
        with self._engine.using() as (model, _):
            return layers_of(model)

    def experts(self) -> Experts:
        """How often each expert was chosen, and where each is now; see Model.experts()."""
        with self._engine.using() as (model, _):
            return experts_of(model)

    def memory(self) -> dict[str, int]:
        """Bytes of host memory in use now, by what they are for; see Model.memory()."""
        with self._engine.using() as (model, _):
            return memory_by_tag(model)

    def metrics(self) -> Metrics:
        """What the engine has done since it was made: reads, stalls, layers and pages that moved."""
        with self._engine.using() as (_, context):
            return metrics_of(context)

    def set_budget(
        self, mem_budget: int | str | None = None, *, vram: int | str | Sequence[int | str] | None = None
    ) -> None:
        """Change the memory that the engine may use, also while it generates; see Model.set_budget()."""
        with self._engine.using() as (model, _):
            change_budgets(model, mem_budget, vram)
