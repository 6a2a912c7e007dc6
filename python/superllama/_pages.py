"""What the paged KV cache of a context holds."""

from __future__ import annotations

import dataclasses
from typing import Any

from ._errors import ContextError
from ._metrics import SequenceMetrics
from ._native import ffi, last_error, lib
from ._words import in_python


@dataclasses.dataclass(frozen=True)
class SequencePages:
    """One sequence: its tokens, and the pages that hold them, in memory and on disk."""

    tokens: int  # that it has
    pages_cpu: int  # in memory
    pages_disk: int  # on disk
    resident_bytes: int  # of its pages, which others may use as well


@dataclasses.dataclass(frozen=True)
class KvPages:
    """The pages of a context. Counters only grow; sizes are in bytes.

    `paged` is False where the standard cache is used; `reason` says why, or what part of the cache is not paged.
    """

    paged: bool  # whether it is
    reason: str  # why not, or which part; "" = all of it is
    page_size: int  # cells
    page_bytes: int  # memory that a page may hold, over all layers
    budget_bytes: int  # that pages may hold
    resident_bytes: int  # that they hold
    resident_peak_bytes: int  # the most that they held
    pages_cpu: int  # with data in memory
    pages_disk: int  # with data on disk only
    evicted_clean: int  # that were on disk already
    evicted_dirty: int  # that were written first
    dropped: int  # that no sequence used any more
    restored: int  # read again
    prefetched: int  # read ahead
    prefetched_used: int  # of those, that were used
    prefetched_wasted: int  # of those, that were evicted before
    ubatches_streamed: int  # layer by layer: their sequences are larger than the budget
    bytes_read: int  # from the spill file
    bytes_written: int  # to it
    stall_ms: float  # spent waiting for the disk
    sequences: list[SequencePages]  # those that have tokens


def sequences_of(context: Any) -> list[SequenceMetrics]:
    """What each sequence of a native context has computed and holds. Raises: ContextError if the library fails."""
    n = lib.superllama_seq_stats(context, ffi.NULL, 0)
    entries = ffi.new("struct superllama_seq_stats[]", max(n, 0))
    if n < 0 or lib.superllama_seq_stats(context, entries, n) < 0:
        raise ContextError(f"the library cannot tell about sequences: {last_error()}")
    fields = [name for name in SequenceMetrics.model_fields if name != "sequence"]
    return [
        SequenceMetrics(sequence=i, **{name: getattr(entry, name) for name in fields})
        for i, entry in enumerate(entries)
    ]


def pages_of(context: Any, n_seq_max: int) -> KvPages:
    """The pages of a native context. Raises: ContextError if the library fails."""
    c = ffi.new("struct superllama_kv_pages *")
    if lib.superllama_kv_pages(context, c) < 0:
        raise ContextError(f"the library cannot tell about KV pages: {last_error()}")
    sequences = []
    s = ffi.new("struct superllama_kv_seq_pages *")
    for seq in range(n_seq_max if c.paged else 0):
        if lib.superllama_kv_seq_pages(context, seq, s) < 0:
            raise ContextError(f"the library cannot tell about sequence {seq}: {last_error()}")
        sequences.append(SequencePages(s.tokens, s.pages_cpu, s.pages_disk, s.resident_bytes))
    plain = {f.name: getattr(c, f.name) for f in dataclasses.fields(KvPages) if f.name not in ("reason", "sequences")}
    return KvPages(**plain, reason=in_python(ffi.string(c.reason).decode()), sequences=sequences)
