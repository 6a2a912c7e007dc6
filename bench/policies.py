"""Replacement policies over a sequence of equal blocks: which references hit. Capacity is in blocks.

A miss loads its block, as demand paging does. Belady's rule (evict what is used last again) is then the optimum.
`pinned` keeps the blocks that the whole trace uses most (known beforehand) and lets the others through one block of
the budget: what our scheduler does for dense models, the ring charged to the budget.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence

Hits = list[bool]


def lru(refs: Sequence[int], capacity: int) -> Hits:
    return _by_recency(refs, capacity, last=False)


def mru(refs: Sequence[int], capacity: int) -> Hits:
    return _by_recency(refs, capacity, last=True)


def _by_recency(refs: Sequence[int], capacity: int, last: bool) -> Hits:
    held: OrderedDict[int, None] = OrderedDict()
    hits = []
    for ref in refs:
        hits.append(ref in held)
        if ref in held:
            held.move_to_end(ref)
            continue
        if len(held) >= capacity:
            held.popitem(last=last)
        held[ref] = None
    return hits


def pinned(refs: Sequence[int], capacity: int) -> Hits:
    """One block of the capacity is the ring, unless everything fits."""
    counts = Counter(refs)
    room = capacity if len(counts) <= capacity else capacity - 1
    kept = {ref for ref, _ in counts.most_common(room)}
    loaded: set[int] = set()
    ring = None
    hits = []
    for ref in refs:
        hits.append(ref in loaded or ref == ring)
        if ref in kept:
            loaded.add(ref)
        else:
            ring = ref
    return hits


def belady(refs: Sequence[int], capacity: int) -> Hits:
    never = len(refs)
    following = [never] * len(refs)
    seen: dict[int, int] = {}
    for i in range(len(refs) - 1, -1, -1):
        following[i] = seen.get(refs[i], never)
        seen[refs[i]] = i
    held: dict[int, int] = {}  # block -> when it is used again
    heap: list[tuple[int, int]] = []  # (-when, block); entries that are out of date are skipped
    hits = []
    for i, ref in enumerate(refs):
        hits.append(ref in held)
        if ref not in held and len(held) >= capacity:
            while True:
                when, block = heapq.heappop(heap)
                if held.get(block) == -when:
                    del held[block]
                    break
        held[ref] = following[i]
        heapq.heappush(heap, (-following[i], ref))
    return hits


POLICIES: dict[str, Callable[[Sequence[int], int], Hits]] = {
    "LRU": lru, "MRU": mru, "pinned": pinned, "optimum": belady,
}  # fmt: skip
