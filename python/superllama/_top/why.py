"""Why a token takes the time that it takes: how much of it waits for reads, and what would change that."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.text import Text

from .._look.amounts import duration, share, volume
from .._look.marks import COMPUTES, FULL, HATCHED, LABEL, MOVES, READS, bar, row
from .rates import Change

WORTH_A_HINT = 0.1  # of the time
NOTHING = 1e5  # bytes a token: rows of embeddings


@dataclass(frozen=True)
class TokenTime:
    """Where the time between two tokens goes, in seconds; the rest is computing, if it was `steady`."""

    whole: float
    reads: float
    moves: float
    bytes_read: float
    steady: bool

    @property
    def rest(self) -> float:
        """What is neither."""
        return self.whole - self.reads - self.moves

    @property
    def largest(self) -> str:
        """Which of the three is most of it: "reads", "moves" or "rest"."""
        return max(("reads", "moves", "rest"), key=lambda part: float(getattr(self, part)))


def token_time(change: Change | None) -> TokenTime | None:
    """Of tokens that were generated; None where none was."""
    if change is None or not (n := change.counts["generated_tokens"]):
        return None
    whole = change.seconds / n
    reads = min(whole, change.counts["stall_ms"] / 1e3 / n)
    moves = min(whole - reads, change.counts["move_ms"] / 1e3 / n)
    n_bytes = change.counts["weight_bytes_read"] + change.counts["kv_bytes_read"]
    return TokenTime(whole, reads, moves, n_bytes / n, change.steady and not change.counts["prompt_tokens"])


def reason(change: Change | None) -> str:
    """In one line of at most 70 characters."""
    if change is None:
        return "no rates: there are no two samples of the last seconds"
    token = token_time(change)
    if token is None:
        return _without_tokens(change)
    if token.largest == "moves":
        return "limited by layers that move to and from devices"
    if token.bytes_read < NOTHING:
        return "as fast as it computes: nothing is read"
    read = f"{volume(token.bytes_read)} a token"
    if token.largest == "reads":
        return f"limited by the disk: {read}, at {volume(token.bytes_read / token.whole)}/s"
    if not token.steady:
        return f"idle at times, or with a prompt in between; reads {read}"
    if token.reads < WORTH_A_HINT * token.whole:
        return f"as fast as it computes: {read} are read meanwhile"
    return f"computing, and waiting for reads: {read}"


def hint(change: Change | None, metrics: Mapping[str, Any], may_change: bool) -> str:
    """What to try; "" where there is nothing."""
    if change is None or change.stalled < WORTH_A_HINT:
        return ""
    if not metrics["prefetch_completed"] and not metrics["prefetch_pending"]:
        return "every read waits; with --async-prefetch it computes meanwhile"
    return "more budget (key +) leaves less to read" if may_change else "more --mem-budget leaves less to read"


def _without_tokens(change: Change) -> str:
    if change.counts["prompt_tokens"]:
        return f"a prompt is computed; {share(change.stalled)} of the time waits for the disk"
    if change.counts["weight_bytes_read"] or change.counts["stall_ms"]:
        return f"no token in {change.seconds:.0f} s; {share(change.stalled)} of it waited for the disk"
    return "idle: nothing was computed in the last seconds"


def token_rows(rates: Change | None, metrics: Mapping[str, Any], may_change: bool, width: int) -> Iterator[Text]:
    """The time of a token, what it is made of, and what follows from that."""
    token = token_time(rates)
    if not token:
        yield row("token", reason(rates))
        yield from [Text()] * 3  # what is below stays where it is
        return
    parts = [
        (token.reads, HATCHED, READS, "reads" if token.moves else "waiting for reads"),
        (token.moves, HATCHED, MOVES, "moves"),
        (token.rest, FULL, COMPUTES, "computing" if token.steady else "computing or idle"),
    ]
    sums = [(f"{mark} {duration(seconds)} {what}", style) for seconds, mark, style, what in parts if seconds > 0]
    colour = READS if token.reads >= WORTH_A_HINT * token.whole else MOVES if token.largest == "moves" else COMPUTES
    yield row("token", f"{duration(token.whole)} = ", Text(" + ").join(Text(*part) for part in sums))
    yield row("", bar([part[:3] for part in parts], token.whole, width - LABEL))
    yield row("", (reason(rates), f"bold {colour}"))
    yield row("", hint(rates, metrics, may_change))
