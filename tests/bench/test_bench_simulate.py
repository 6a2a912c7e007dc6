from functools import cache

import numpy as np
import pytest
from bench import policies, simulate
from bench.trace import table
from hypothesis import given, settings
from hypothesis import strategies as st


@given(st.integers(2, 30), st.data())
def test_cyclic_scan(n, data):
    capacity = data.draw(st.integers(1, n - 1))
    cycles = 8
    refs = list(range(n)) * cycles
    assert sum(policies.lru(refs, capacity)) == 0
    best = sum(policies.belady(refs, capacity))
    pinned = sum(policies.pinned(refs, capacity))
    assert pinned <= best <= pinned + cycles  # within one block per pass
    assert sum(policies.mru(refs, capacity)) <= best


@given(st.integers(1, 20))
def test_everything_fits(n):
    refs = list(range(n)) * 3
    for policy in policies.POLICIES.values():
        assert sum(policy(refs, n)) == 2 * n


def brute_force(refs: tuple[int, ...], capacity: int) -> int:
    """The most hits that any choice of victims gives."""

    @cache
    def best(i: int, held: frozenset) -> int:
        if i == len(refs):
            return 0
        if refs[i] in held:
            return 1 + best(i + 1, held)
        if len(held) < capacity:
            return best(i + 1, held | {refs[i]})
        return max(best(i + 1, held - {victim} | {refs[i]}) for victim in held)

    return best(0, frozenset())


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=11), st.integers(1, 4))
def test_belady_is_the_optimum(refs, capacity):
    assert sum(policies.belady(refs, capacity)) == brute_force(tuple(refs), capacity)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 9))
def test_nothing_beats_the_optimum(refs, capacity):
    best = sum(policies.belady(refs, capacity))
    assert sum(policies.lru(refs, capacity)) <= best
    assert sum(policies.mru(refs, capacity)) <= best


def test_blocks_of_requests():
    trace = table.make([0, 1, 2, 3], [0, 100, 250, 0], [100, 150, 10, 1], "m")
    assert simulate.to_blocks(trace, 100) == [0, 1, 2, 0]  # 100-250 ends in block 2, where the next one starts


def test_experts_of_a_trace():
    layer, expert = np.array([0, 0, 0, 1]), np.array([3, 3, 3, 0])
    trace = table.make([0, 0, 0, 0], [0, 50, 90, 7], [10, 10, 10, 30], "m", layer=layer, expert=expert)
    refs, size = simulate.to_experts(trace, None)
    assert len(refs) == 2
    assert size == 30


def test_budget_below_one_block():
    with pytest.raises(ValueError, match=r"less than one block of 1\.0 KB"):
        simulate.replay([1, 2], 1000, [10])
