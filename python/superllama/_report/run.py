"""What one context did, from its metrics lines: the differences between them, and their sums.

A line says what has been counted so far. What happened between two lines is their difference, and takes the time
between them, but for a pause: where only tokens were generated, the line says how long that took.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

from pydantic import ConfigDict, Field

from .._metrics import Count, ExpertCounts, Metrics, Rate

KEPT = 1024  # parts of a run that are kept apart
PAUSE_S = 1.0  # what a line's own time is shorter than the time since the one before; less is no pause

# what only grows, in one context
COUNTERS = (
    *("prompt_tokens", "generated_tokens", "layers_loaded", "layers_evicted", "weight_bytes_read", "stall_ms"),
    *("kv_pages_evicted", "kv_bytes_read", "kv_bytes_written", "prefetch_completed", "expert_hits", "expert_misses"),
    *("expert_guesses", "expert_guesses_used", "move_ms", "mem_peak_bytes"),
)


class Line(Metrics):
    """A metrics line as a file has it: a later version may have added fields, and an earlier one had fewer."""

    model_config = ConfigDict(extra="ignore")

    threads: Count = 0
    core_wait_ms: Rate = 0.0
    throttled_ms: Rate = 0.0
    expert_device_hits: Count = 0
    expert_device_misses: Count = 0
    expert_host_computed: Count = 0
    weight_bytes_ahead: Count = 0
    expert_device_guesses: Count = 0
    expert_device_guesses_used: Count = 0
    experts: ExpertCounts | None = None
    # the fields of these are their version's too
    sequences: list[dict[str, Any]] = Field(default=[])  # type: ignore[assignment]
    devices: list[dict[str, Any]] = Field(default=[])  # type: ignore[assignment]

    @property
    def used(self) -> int:
        """Bytes of the budget that are in use."""
        return sum(self.memory_by_tag.values())


@dataclasses.dataclass(frozen=True)
class Counts:
    """What happened in some time."""

    seconds: float = 0.0  # without pauses
    prompt: int = 0  # tokens
    generated: int = 0
    generating: float = 0.0  # seconds of passes that generated; 0 = not known
    stalled: float = 0.0  # seconds
    moved: float = 0.0
    read: int = 0  # bytes of weights
    kv_read: int = 0
    kv_written: int = 0
    hits: int = 0  # of experts
    misses: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(operator.add, _values(self), _values(other)))

    @property
    def stall_share(self) -> float:
        """Of the time, that which went by waiting for reads."""
        return min(1.0, self.stalled / self.seconds) if self.seconds else 0.0

    @property
    def hit_share(self) -> float | None:
        """Of the experts that were asked for, those that were in memory; None if none was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else None

    @property
    def tokens_per_s(self) -> float | None:
        """Generated, while generating."""
        return self.generated / self.generating if self.generated and self.generating else None


_values = operator.attrgetter(*(field.name for field in dataclasses.fields(Counts)))


@dataclasses.dataclass(frozen=True)
class Interval:
    """From one line to the next, or over several; in seconds since the first line of the run."""

    start: float
    begin: float  # of what happened; before it was a pause
    generates: float  # since when; before it was a prompt, a pause, or both
    end: float
    counts: Counts
    line: Line  # at its end, for how things were


class Run:
    """One context: its lines in their order, of which the first and the last are kept, and what is between them."""

    def __init__(self, line: Line) -> None:
        self.first = self.last = line
        self.n_lines = 1
        self.intervals: list[Interval] = []
        self.total = Counts()  # since the first line
        self.generation = Counts()  # of intervals in which nothing but generation happened
        self.peak = line  # when most was in use
        self.budgets = {line.mem_budget_bytes}
        self.experts: dict[str, Any] | None = None  # as they were told last
        self._note_experts(line)
        self.seconds = 0.0  # from the first line to the last

    @property
    def ended(self) -> bool:
        """Whether its context has been freed."""
        return self.last.event == "final"

    @property
    def dynamic(self) -> bool:
        """Whether the model was loaded with dynamic layers: without, nothing is in a budget."""
        return self.last.mem_budget_bytes > 0 or self.peak.used > 0

    def goes_on_with(self, line: Line) -> bool:
        """Whether the line can be of this context: no counter goes back."""
        return not self.ended and all(getattr(self.last, name) <= getattr(line, name) for name in COUNTERS)

    def add(self, line: Line) -> None:
        """The next line."""
        begin, self.seconds = self.seconds, max(self.seconds, (line.timestamp - self.first.timestamp).total_seconds())
        counts = difference(self.last, line, self.seconds - begin)
        # a context that ends has given its memory back: it is shown as it was before
        shown = self.last if line.event == "final" else line
        self.intervals.append(interval(begin, self.seconds, counts, shown))
        self.total += counts
        if counts.generating and not counts.prompt:
            self.generation += counts
        if line.used > self.peak.used:
            self.peak = line
        if len(self.budgets) < KEPT:
            self.budgets.add(line.mem_budget_bytes)
        self.last = line
        self._note_experts(line)
        self.n_lines += 1
        if len(self.intervals) >= 4 * KEPT:
            self.intervals = self.columns(KEPT)

    def _note_experts(self, line: Line) -> None:
        if line.experts is not None:
            self.experts = line.experts.model_dump()

    def columns(self, n: int) -> list[Interval]:
        """The run in about n parts, each at least as wide as an n-th of it, but where a pause is as wide: less than
        twice as many."""
        width = self.seconds / n
        seen = max(PAUSE_S, width)  # a shorter pause would not be seen
        found: list[Interval] = []
        for one in self.intervals:
            if found and found[-1].end - found[-1].start < width and one.generates - one.start < seen:
                found[-1] = joined(found[-1], one)
            else:
                found.append(one)
        if len(found) > 1 and found[-1].end - found[-1].start < width:
            found[-2:] = [joined(*found[-2:])]
        return found


def difference(a: Line, b: Line, seconds: float) -> Counts:
    """What happened between two lines of a context that were written so many seconds apart."""
    prompt, generated = b.prompt_tokens - a.prompt_tokens, b.generated_tokens - a.generated_tokens
    generating = 0.0
    if generated and b.tokens_per_sec and b.metrics_dropped == a.metrics_dropped:  # else it is the rate of fewer tokens
        generating = min(generated / b.tokens_per_sec, seconds)
    # only generation has a time of its own: of a prompt nobody knows how much of the time between two lines it took
    paused = generating > 0 and not prompt and seconds - generating > PAUSE_S
    return Counts(
        seconds=generating if paused else seconds,
        prompt=prompt,
        generated=generated,
        generating=generating,
        stalled=(b.stall_ms - a.stall_ms) / 1e3,
        moved=(b.move_ms - a.move_ms) / 1e3,
        read=b.weight_bytes_read - a.weight_bytes_read,
        kv_read=b.kv_bytes_read - a.kv_bytes_read,
        kv_written=b.kv_bytes_written - a.kv_bytes_written,
        hits=b.expert_hits - a.expert_hits,
        misses=b.expert_misses - a.expert_misses,
    )


def interval(start: float, end: float, counts: Counts, line: Line) -> Interval:
    """One between two lines."""
    begin = max(start, end - counts.seconds)
    generates = end - counts.generating
    return Interval(
        start, begin, generates if counts.generating and generates - start > PAUSE_S else begin, end, counts, line
    )


def joined(a: Interval, b: Interval) -> Interval:
    """Two neighbours as one."""
    return Interval(a.start, a.begin, a.generates, b.end, a.counts + b.counts, b.line)
