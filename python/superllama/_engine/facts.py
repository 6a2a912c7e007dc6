"""The model of an engine, for who wants to know what it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from .._facts import ModelFacts
from .._native import lib
from .handle import Handle


class EngineFacts(ModelFacts):
    """What Model says of a file: metadata, sizes, tokens; without a model of its own. Made by LLM.facts."""

    def __init__(self, engine: Handle) -> None:
        self._engine = engine

    @contextlib.contextmanager
    def _use(self) -> Iterator[Any]:
        with self._engine.using() as (model, _):
            self._vocab = lib.llama_model_get_vocab(model)  # another one after a pause
            yield model
