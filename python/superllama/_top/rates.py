"""Rates of a running model: differences of its counters between two samples, over the time between them.

Counters that went backwards belong to another run (a server began again, a model was loaded again), and give no rate.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

COUNTERS = (
    *("prompt_tokens", "generated_tokens", "weight_bytes_read", "kv_bytes_read", "stall_ms", "move_ms"),
    *("expert_hits", "expert_misses"),
)
KEPT_S = 300.0  # what the widest picture shows
SHORTEST_S = 0.5  # between two samples that are kept: a metrics file may have a line for every token

RECENT_S = 5.0
RECENT_SLOW_S = 20.0  # where fewer than FEW tokens came in RECENT_S, and reads went on
FEW = 5


@dataclass(frozen=True)
class Sample:
    """Counters at one moment, by the clock of who counted."""

    at: float
    counts: Mapping[str, float]

    @classmethod
    def of(cls, metrics: Mapping[str, Any]) -> Sample:
        """From the fields of a metrics line. Raises: ValueError where they are none."""
        try:
            at = datetime.fromisoformat(metrics["timestamp"].replace("Z", "+00:00")).timestamp()
            return cls(at, {name: float(metrics[name]) for name in COUNTERS})
        except (KeyError, TypeError, AttributeError) as e:
            raise ValueError(f"these are no metrics: {e}") from e


@dataclass(frozen=True)
class Change:
    """What happened between two samples of one run."""

    seconds: float
    counts: Mapping[str, float]
    steady: bool = True  # tokens were generated between all samples on the way

    def per_second(self, *names: str) -> float:
        """The rate of a counter, or of the sum of several."""
        return sum(self.counts[name] for name in names) / self.seconds

    @property
    def stalled(self) -> float:
        """The share of the time in which a computation waited for reads."""
        return min(1.0, self.counts["stall_ms"] / 1e3 / self.seconds)

    @property
    def expert_hits(self) -> float | None:
        """The share of experts that were in memory when they were asked for; None where none was."""
        asked = self.counts["expert_hits"] + self.counts["expert_misses"]
        return self.counts["expert_hits"] / asked if asked else None


def change(before: Sample, after: Sample) -> Change | None:
    """What happened between two samples; None if they are not of the same run, or of the same moment."""
    counts = {name: after.counts[name] - before.counts[name] for name in COUNTERS}
    if after.at <= before.at or min(counts.values()) < 0:
        return None
    return Change(after.at - before.at, counts, counts["generated_tokens"] > 0)


class History:
    """The samples of the last minutes, the newest one last."""

    def __init__(self) -> None:
        self._samples: list[Sample] = []

    def add(self, sample: Sample) -> None:
        """Keep it; in place of the newest one, if that came shortly after the one before."""
        kept = self._samples
        if len(kept) > 1 and 0 <= kept[-1].at - kept[-2].at < SHORTEST_S and change(kept[-1], sample):
            kept.pop()
        kept.append(sample)
        self._samples = [old for old in kept if abs(sample.at - old.at) <= KEPT_S]

    def samples(self) -> tuple[Sample, ...]:
        """As they are now."""
        return tuple(self._samples)


def recent(samples: Sequence[Sample]) -> Change | None:
    """The last seconds, of one run: some more of them where tokens take seconds. None where there is no rate."""
    found = _last(samples, RECENT_S)
    if found and found.counts["generated_tokens"] < FEW and found.per_second("weight_bytes_read", "kv_bytes_read"):
        return _last(samples, RECENT_SLOW_S)
    return found


def _last(samples: Sequence[Sample], seconds: float) -> Change | None:
    first, steady = len(samples) - 1, True
    while first > 0 and (step := change(samples[first - 1], samples[first])):
        if samples[-1].at - samples[first - 1].at > seconds and first < len(samples) - 1:
            break
        steady &= step.steady
        first -= 1
    if first < 0 or not (found := change(samples[first], samples[-1])):
        return None
    return Change(found.seconds, found.counts, steady)


def series(samples: Sequence[Sample], names: Sequence[str], end: float, n: int, step: float) -> list[float | None]:
    """The rate of a sum of counters in each of the `n` steps before `end`; None where it is not known."""
    totals, known = [0.0] * n, [0.0] * n
    start = end - n * step
    for before, after, found in _changes(samples):
        first, last = (int((at - start) // step) for at in (before.at, after.at))
        for i in range(max(0, first), min(n, last + 1)):
            left = start + i * step
            overlap = min(after.at, left + step) - max(before.at, left)
            totals[i] += found.per_second(*names) * overlap
            known[i] += overlap
    return [total / seconds if seconds >= step / 2 else None for total, seconds in zip(totals, known, strict=True)]


def _changes(samples: Sequence[Sample]) -> Iterator[tuple[Sample, Sample, Change]]:
    for before, after in pairwise(samples):
        if found := change(before, after):
            yield before, after, found
