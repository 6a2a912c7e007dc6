"""A text's embedding does not depend on what other slots compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from serving import http_server

TEXTS = ["a b c d e f g h i j k l m n o p", "a", "b a c a", "one two three four five six seven eight"]


@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_several_slots_give_what_one_gives(demo_model: Path, tmp_path: Path, pooling: str) -> None:
    flags = ["--embeddings", "--pooling", pooling, "-np", len(TEXTS), "-c", 1024, "-t", 1]
    with http_server(demo_model, tmp_path / "log", *flags) as server:

        def embed(texts: Any) -> Any:
            status, answer = server.request("/v1/embeddings", {"input": texts})
            assert status == 200, answer
            return np.array([entry["embedding"] for entry in answer["data"]])

        alone = np.concatenate([embed(text) for text in TEXTS])
        together = embed(TEXTS)
    assert (alone * together).sum(1).min() > 0.9999
