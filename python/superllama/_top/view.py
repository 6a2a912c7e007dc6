"""The picture of `superllama top`: what was seen of a running model, as lines for a terminal of 80 columns or more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from .._look.amounts import duration, number
from .._look.marks import COMPUTES, LABEL, READS, VALUE, for_terminal, row, sparkline
from .._look.status import state_of
from .help import HELP
from .memory import expert_rows, kv_page_rows, layer_rows, memory_rows, pool_rows
from .rates import Change, Sample, recent, series
from .why import token_rows

STALE_S = 3.0  # older samples give no rate: of a metrics file, twice the time between its lines
STEP_S = 2.0  # of one character of history
STATES = {"ready": "green", "degraded": "yellow", "draining": "yellow"}


@dataclass(frozen=True)
class Picture:
    """What is shown at one moment."""

    name: str  # of the source
    samples: Sequence[Sample] = ()
    found: Mapping[str, Any] | None = None  # as GET /superllama answers; only "metrics", from a file
    age: float = 0.0  # seconds since the newest sample
    problem: str = ""  # why there is no newer one
    may_change: bool = False
    keys: str = ""
    message: str = ""
    help: bool = False

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Its lines; as many as the height has, where that is limited."""
        width, height = options.max_width, options.height
        body = [_title(self, width)]
        if self.problem:
            body += Text(self.problem, "red").wrap(console, width)
        body += [Text(line) for line in HELP] if self.help else _body(self, width)
        foot = [Text(self.keys, "dim")] if self.keys else []
        foot += Text(self.message, "bold").wrap(console, width) if self.message else [Text()] * len(foot)
        for line in body + foot if height is None else _fitted(body, foot, height):
            line.no_wrap = True
            for_terminal(line, options.ascii_only).truncate(width)
            yield line

    def rates(self) -> Change | None:
        """Of the last seconds; None where what is known is older."""
        return None if self.problem or self.stale() else recent(self.samples)

    def stale(self) -> bool:
        """Whether samples should have come since the newest one."""
        if self.ended():
            return False
        gap = self.samples[-1].at - self.samples[-2].at if len(self.samples) > 1 else 0.0
        return self.age > max(STALE_S, 2 * gap)

    def ended(self) -> bool:
        """Whether a metrics file says that no more is to come."""
        found = self.found or {}
        return "version" not in found and found.get("metrics", {}).get("event") == "final"


def _fitted(body: list[Text], foot: list[Text], height: int) -> list[Text]:
    """As many lines as there is room for: first the empty ones go, then the end of the body."""
    room = max(0, height - len(foot))
    if len(body) > room:
        body = [line for line in body if line.plain.strip()]
    return (body[:room] + [Text()] * (room - len(body)) + foot)[-height:]


def _title(shown: Picture, width: int) -> Text:
    right = _state(shown)
    left = Text(f"superllama {(shown.found or {}).get('version', 'top')}  {shown.name}", "bold")
    left.truncate(max(0, width - right.cell_len - 2))
    return left.append(" " * (width - left.cell_len - right.cell_len)).append_text(right)


def _state(shown: Picture) -> Text:
    found = shown.found
    if not found:
        return Text("nothing seen yet", "dim")
    for_s = f"for {duration(round(shown.age))}"
    if shown.ended():
        return Text("ended")
    if "version" not in found:  # a file
        return Text(f"no line {for_s}", "yellow") if shown.stale() else Text("runs", "green")
    if shown.problem or shown.stale():
        return Text(f"no answer {for_s}", "bold red")
    text = Text(state_of(found), STATES.get(state_of(found), "magenta"))
    if (n := found.get("requests_in_flight")) is not None:
        text.append(f", {n} request{'s' * (n != 1)} in flight", "default")
    return text


def _body(shown: Picture, width: int) -> Iterator[Text]:
    found = shown.found
    if not found:
        return
    if found.get("router"):
        yield from pool_rows(found["pool"], width)
        return
    if not found.get("metrics"):
        key = " (key p)" if shown.may_change else ""
        yield row("memory", f"given back: there is no model in memory until the server resumes{key}")
        return
    rates = shown.rates()
    yield from token_rows(rates, found["metrics"], shown.may_change, width)
    yield Text()
    yield from layer_rows(found, width)
    yield from expert_rows(rates, found["metrics"])
    yield from kv_page_rows(found["metrics"])
    yield Text()
    yield from _rates(shown, rates, width)
    yield Text()
    yield from memory_rows(found, width)


def _rates(shown: Picture, rates: Change | None, width: int) -> Iterator[Text]:
    """The last seconds as numbers, the last minutes as sparklines."""
    columns = min(120, max(0, width - LABEL - VALUE - 12))
    end = (shown.samples[-1].at if shown.samples else 0.0) + (shown.age if shown.problem or shown.stale() else 0.0)
    end = -(-end // STEP_S) * STEP_S  # so that what was drawn moves, and does not change
    for label, unit, scale, style, names in (
        ("generated", "tok/s", 1.0, COMPUTES, ("generated_tokens",)),
        ("prompt", "tok/s", 1.0, COMPUTES, ("prompt_tokens",)),
        ("reads", "MB/s", 1e-6, READS, ("weight_bytes_read", "kv_bytes_read")),
        ("stalled", "%", 0.1, READS, ("stall_ms",)),  # milliseconds a second
    ):
        values = [v if v is None else v * scale for v in series(shown.samples, names, end, columns, STEP_S)]
        most = max((v for v in values if v is not None), default=0.0)
        top, said = (100.0, "of 100") if unit == "%" else (most, f"max {number(most)}")
        now = "-" if rates is None else number(rates.per_second(*names) * scale)
        yield row(label, f"{now:>5} {unit:<5}  ", (sparkline(values, top), style), (f"  {said}", "dim"))
