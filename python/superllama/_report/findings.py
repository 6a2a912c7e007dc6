"""What follows from the numbers of a run, in sentences; and where the time of a token went."""

from __future__ import annotations

from dataclasses import dataclass

from .._look.amounts import GIB, MIB, duration, memory, number, share, volume
from .run import Counts, Run

FEW = 4  # generated tokens of which no rule is made
WAITS = 0.3  # of the time: reads decide
HIDDEN = 0.1  # below: reads are done beside the computation
NOTED = 0.02  # a smaller part of the time is not spoken of


@dataclass(frozen=True)
class Spent:
    """Time, by what the counters say of it."""

    of: str  # what it is the time of
    counts: Counts
    per: int  # tokens that it is divided by

    @property
    def parts(self) -> dict[str, float]:
        """Seconds for each of `per`, all that was not counted as waiting or moving as "computing"."""
        c = self.counts
        waiting = min(c.stalled, c.seconds)
        moving = min(c.moved, c.seconds - waiting)
        rest = c.seconds - waiting - moving
        return {name: s / self.per for name, s in (("computing", rest), ("waiting", waiting), ("moving", moving))}


def spent(run: Run) -> Spent | None:
    """Of a generated token, where enough were generated without a prompt beside them; else of the run as a whole."""
    if run.generation.generated >= FEW and run.generation.seconds > 0:
        return Spent("a generated token", run.generation, run.generation.generated)
    return Spent("the run, from its first line to its last", run.total, 1) if run.total.seconds > 0 else None


def findings(run: Run) -> list[str]:
    """Sentences, the most telling first."""
    if not run.dynamic:
        return [
            "The model was loaded without dynamic layers: its memory was the kernel's, and what was read is not known."
        ]
    found = [*_reads(run), *_more(run), *_experts(run), *_moves(run), *_pages(run), *_budgets(run), *_trouble(run)]
    return found or ["Too little was computed for anything to follow from it."]


def _reads(run: Run) -> list[str]:
    time = spent(run)
    if time is None:
        return []
    c, waited, is_token = time.counts, time.counts.stall_share, time.per > 1
    if not c.read and not c.stalled:
        since = "while it generated" if is_token else "after the first line"
        return [f"All weights that were used are in memory: nothing was read {since}."]
    of = f"{share(waited)} of the time{' of a generated token' if is_token else ''} was spent waiting for"
    each = f"; about {memory(c.read / time.per)} of weights are read for each token" if is_token and c.read else ""
    if waited >= WAITS:
        return [f"{of} reads: a larger budget or a faster disk would help{each}.", *_ahead(run)]
    if waited >= HIDDEN:
        return [f"{of} reads{each}.", *_ahead(run)]
    if is_token and c.read < MIB * time.per:
        return [f"Reads cost next to nothing: {of} them{each}."]
    return [f"Reads are hidden behind the computation: {of} them{each}."]


def _ahead(run: Run) -> list[str]:
    if run.last.prefetch_completed or run.last.prefetch_pending:
        return []
    return ["Nothing was read ahead: with --async-prefetch reads go on while the CPU computes."]


def _more(run: Run) -> list[str]:
    """What a larger budget would give a dense model; of experts nobody knows which ones will be asked for."""
    c = run.generation
    if c.generated < FEW or c.stall_share < HIDDEN or c.read < MIB * c.generated:
        return []
    if c.hits + c.misses or c.kv_read + c.kv_written:  # KV pages are waited for, too
        return []
    read, seconds, waited = c.read / c.generated, c.seconds / c.generated, c.stalled / c.generated
    more = min(GIB, read)
    faster = 1 / max(seconds - waited * more / read, 1e-9)
    budget = "1 GiB" if more == GIB else f"about {memory(more)}"
    less = f"{memory(more)} less would be read for each token" if more < read else "nothing would have to be read"
    return [
        f"With {budget} more of budget, {less}: about {number(faster)} tokens/s instead of {number(1 / seconds)}, "
        "if the waiting falls as the reads do and each pass over the weights computes one token."
    ]


def _experts(run: Run) -> list[str]:
    c = run.generation if run.generation.hit_share is not None else run.total
    if c.hit_share is None:
        return []
    guesses, used = run.last.expert_guesses, run.last.expert_guesses_used
    ahead = f"; of {guesses:,} read on a guess, {share(used / guesses)} were then chosen" if guesses else ""
    return [f"{share(c.hit_share)} of the experts were in memory when they were asked for{ahead}."]


def _moves(run: Run) -> list[str]:
    c = run.total
    if c.moved < NOTED * c.seconds or not c.moved:
        return []
    of = share(min(1.0, c.moved / c.seconds))
    return [f"{duration(c.moved)}, {of} of the time, went into moving layers to and from devices."]


def _pages(run: Run) -> list[str]:
    n = run.last.kv_pages_evicted
    if not n:
        return []
    written, read = volume(run.last.kv_bytes_written), volume(run.last.kv_bytes_read)
    return [f"{n:,} KV page{'' if n == 1 else 's'} had to leave memory: {written} were written, {read} read back."]


def _budgets(run: Run) -> list[str]:
    budgets = run.budgets
    if len(budgets) < 2:
        return []
    return [f"The budget changed while it ran, between {memory(min(budgets))} and {memory(max(budgets))}."]


def _trouble(run: Run) -> list[str]:
    found = []
    if run.last.prefetch_failed:
        found.append(f"{run.last.prefetch_failed:,} reads ahead failed.")
    if run.last.metrics_dropped:
        found.append(
            f"{run.last.metrics_dropped:,} lines are missing: the disk of the metrics file could not take them."
        )
    return found
