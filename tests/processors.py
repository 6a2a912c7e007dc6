"""Functions of a caller that are asked before each token, for tests."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Scores = npt.NDArray[np.float32]


class MineError(Exception):
    """What a function of a caller raises."""


def forced(token: int) -> Any:
    """The next token is this one, whatever the model says."""

    def only(tokens: Ids, scores: Scores) -> Scores:
        found = np.full_like(scores, -np.inf)
        found[token] = 0
        return found

    return only
