"""Banks of experts as the bench computes them, beside plain counts."""

from __future__ import annotations

import math

import numpy as np
import pytest
from bench.moe_misses import Bank, time_of


@pytest.mark.parametrize("link", [0.1, 0.5, 2, math.inf])
def test_what_is_missing_is_sent_or_computed(link: float) -> None:
    random = np.random.default_rng(1)
    bank, missing, sent = Bank(5, link), 0, 0
    for now in range(300):
        chosen = random.choice(12, 3, replace=False).tolist()
        before = set(bank.last_use)
        n_sent, n_computed = bank.use(chosen, now)
        assert n_sent + n_computed == len(set(chosen) - before)
        assert len(bank.last_use) <= 5 and len(set(bank.last_use) - before) == n_sent
        missing, sent = missing + n_sent + n_computed, sent + n_sent
    assert missing > 300
    assert missing * (link / (1 + link) if link < math.inf else 1) - 1 <= sent <= missing
    assert (sent < missing) == (link < math.inf)


def test_link_and_processor_work_at_the_same_time() -> None:
    ids = np.arange(400, dtype=np.int32).reshape(100, 1, 4) % 200  # nothing is asked for twice while it is there
    send, hits = time_of(ids, 200, 0.1, 0.5, False)
    assert (send, hits) == (8, 0)
    share, hits = time_of(ids, 200, 0.1, 1.0, True)
    assert (share, hits) == (2, 0)
    assert time_of(np.zeros((100, 2, 1), np.int32), 10, 0.5, 1.0, False) == (0, 1)
