"""The pictures of a run over time: which there are, their steps and scales, and the value at each moment."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .._look.amounts import memory, number, plain, share
from .._look.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    SMALL,
    TEAL,
    TIER_COLOURS,
    TIER_WORDS,
    Step,
    in_order,
    path,
    tag_colour,
    ticks,
)
from .run import Counts, Interval, Line, Run

COLUMNS = 160  # of a picture, at most about

Text = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """One line or area, its value in each column as text, and the one that stands there when none is pointed at."""

    name: str
    colour: str  # "" is that of text
    path: str
    texts: list[str]
    rest: str
    line: str = ""  # the path of its upper edge, for an area that stands alone
    area: bool = True


@dataclass(frozen=True)
class Chart:
    """One picture. Areas are drawn in their order, each over the one before."""

    title: str
    note: str
    scale: list[tuple[float, str]]  # percent from the top, and what is written there
    series: list[Series]
    low: bool = False  # few things are counted


def charts(run: Run) -> tuple[list[float], list[Chart]]:
    """Where each column ends, in percent of the run's time, and the pictures that the run has something for."""
    if not run.seconds:
        return [], []
    columns = run.columns(COLUMNS)
    found = [_speed(run, columns), _waiting(run, columns), _reading(run, columns), _experts(run, columns),
             _memory(run, columns), _layers(run, columns), _pages(run, columns)]  # fmt: skip
    ends = [round(100 * c.end / run.seconds, 2) for c in columns]
    return ends, [chart for chart in found if chart]


# ---------------------------------------------------------------- what happened: one value for each column


def _speed(run: Run, columns: Sequence[Interval]) -> Chart | None:
    values = [c.counts.tokens_per_s for c in columns]
    if not any(values):
        return None
    average = f"{number(run.total.tokens_per_s or run.last.avg_tokens_per_sec)} on average"
    return _flow("Tokens per second", "generated, while generating", "tokens/s", BLUE, run, columns, values, number,
                 average, begin=lambda c: c.generates)  # fmt: skip


def _waiting(run: Run, columns: Sequence[Interval]) -> Chart | None:
    if not run.dynamic:
        return None
    values = [c.counts.stall_share for c in columns]
    average = f"{share(run.total.stall_share)} on average"
    return _flow("Waiting for reads", "share of the time", "waiting", ORANGE, run, columns, values, share, average, 1.0)


def _reading(run: Run, columns: Sequence[Interval]) -> Chart | None:
    def rate(c: Counts) -> float:
        return (c.read + c.kv_read) / 1e6 / c.seconds if c.seconds else 0.0

    if not run.total.read + run.total.kv_read:
        return None
    values = [rate(c.counts) for c in columns]
    average = f"{number(rate(run.total))} MB/s on average"
    note = "MB/s, of weights and of KV pages" if run.total.kv_read else "MB/s of weights"
    return _flow("Read from disk", note, "MB/s", TEAL, run, columns, values, number, average)


def _experts(run: Run, columns: Sequence[Interval]) -> Chart | None:
    if run.total.hit_share is None:
        return None
    values = [c.counts.hit_share for c in columns]
    average = f"{share(run.total.hit_share)} on average"
    note = "share of those asked for"
    return _flow("Experts found in memory", note, "in memory", GREEN, run, columns, values, share, average, 1.0)


def _flow(
    title: str,
    note: str,
    name: str,
    colour: str,
    run: Run,
    columns: Sequence[Interval],
    values: Sequence[float | None],
    text: Text,
    rest: str,
    most: float = 0.0,
    begin: Callable[[Interval], float] = lambda c: c.begin,
) -> Chart:
    """A value for what happened in each column; none, and a gap, where nothing did."""
    scale = ticks(most or max(v for v in values if v is not None))
    steps = [(begin(c), c.end, v) for c, v in zip(columns, values, strict=True) if v is not None]
    texts = ["–" if v is None else text(v) for v in values]
    area, line = (path(steps, run.seconds, scale[-1], area=filled) for filled in (True, False))
    written = _written(scale, plain if text is number else text)
    return Chart(title, note, written, [Series(name, colour, area, texts, rest, line)])


# ---------------------------------------------------------------- how things were: at the end of each column


def _memory(run: Run, columns: Sequence[Interval]) -> Chart | None:
    if not run.dynamic:
        return None
    peak = run.peak
    large = _large_tags(columns, peak)

    def parts(line: Line) -> list[float]:
        found = [float(line.memory_by_tag.get(tag, 0)) for tag in large]
        return [*found, line.used - sum(found)]

    named = [*((tag, tag_colour(tag)) for tag in large), ("other", GREY)]
    scale = ticks(max(peak.used, *run.budgets), base=2)
    stack = _stack(named, parts, parts(peak), run, columns, scale[-1], memory)
    budget = [(c.start, c.end, float(c.line.mem_budget_bytes)) for c in columns]
    drawn = path(budget, run.seconds, scale[-1], area=False)
    texts = [memory(c.line.mem_budget_bytes) for c in columns]
    line = Series("budget", "", drawn, texts, memory(peak.mem_budget_bytes), area=False)
    return Chart("Memory by what it is for", "numbers: when most was in use", _written(scale, memory), [*stack, line])


def _large_tags(columns: Sequence[Interval], peak: Line) -> list[str]:
    """What memory was for, as far as it was more than a little of it at some time, in the order of drawing."""
    lines = [peak, *(c.line for c in columns)]
    tags = in_order({tag for line in lines for tag in line.memory_by_tag})
    return [tag for tag in tags if max(line.memory_by_tag.get(tag, 0) for line in lines) > SMALL * peak.used]


def _layers(run: Run, columns: Sequence[Interval]) -> Chart | None:
    if not run.dynamic:
        return None

    def parts(line: Line) -> list[float]:
        return [float(n) for n in (line.gpu_layers_active, line.cpu_layers_active, line.disk_layers_active)]

    last = parts(columns[-1].line)
    named = [(TIER_WORDS[tier], colour) for tier, colour in TIER_COLOURS.items()]
    scale = ticks(sum(last), n=2, least=1)
    stack = _stack(named, parts, last, run, columns, scale[-1], plain)
    return Chart("Layers by tier", "numbers: at the end", _written(scale, plain), stack, low=True)


def _pages(run: Run, columns: Sequence[Interval]) -> Chart | None:
    def parts(line: Line) -> list[float]:
        return [float(n) for n in (line.kv_pages_gpu, line.kv_pages_cpu, line.kv_pages_disk)]

    most = max(sum(parts(c.line)) for c in columns)
    if not most:
        return None
    named = [
        (name, TIER_COLOURS[tier])
        for name, tier in (("on devices", "device"), ("in memory", "host"), ("on disk", "disk"))
    ]
    scale = ticks(most, n=2, least=1)
    stack = _stack(named, parts, parts(columns[-1].line), run, columns, scale[-1], plain)
    return Chart("KV pages by tier", "numbers: at the end", _written(scale, plain), stack, low=True)


def _stack(
    named: Sequence[tuple[str, str]],
    parts: Callable[[Line], list[float]],
    rest: Sequence[float],
    run: Run,
    columns: Sequence[Interval],
    height: float,
    text: Text,
) -> list[Series]:
    """One area on the other; those that are nothing throughout are left out. The uppermost is drawn first."""
    found: list[Series] = []
    values = [parts(c.line) for c in columns]
    for i, (name, colour) in enumerate(named):
        if not any(v[i] for v in values):
            continue
        steps: list[Step] = [(c.start, c.end, sum(v[: i + 1])) for c, v in zip(columns, values, strict=True)]
        texts = [text(v[i]) for v in values]
        found.append(Series(name, colour, path(steps, run.seconds, height, area=True), texts, text(rest[i])))
    return found[::-1]


def _written(scale: Sequence[float], text: Text) -> list[tuple[float, str]]:
    return [(100 * (1 - v / scale[-1]), "0" if v == 0 else text(v)) for v in scale]
