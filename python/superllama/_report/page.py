"""`superllama report`: a run's metrics file as one page of pictures, for any browser, without network."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from .. import __version__
from .._errors import Error
from .._files import replaceable
from .._look.amounts import duration, memory, number, share, volume
from .._look.drawing import BLUE, ORANGE, PURPLE, bar, time_ticks
from .._look.heat import heat_map
from .._look.html import FOLDER, templates
from .charts import charts
from .file import MetricsFile, read_metrics
from .findings import Spent, findings, spent
from .run import Run

MARK = "<!doctype html>\n<!-- superllama report -->"  # how a page of ours begins

_SPENT = {
    "computing": ("computing and all else", BLUE),
    "waiting": ("waiting for reads", ORANGE),
    "moving": ("moving layers to and from devices", PURPLE),
}


def write_report(metrics: Path, page: Path | None = None, context: int | None = None) -> Path:
    """Read a metrics file and write its page, beside it unless a name is given. `context` is which of several in the
    file, from 1; the one with the most tokens by default.

    Raises: Error if there are no metrics in the file, no such context, or something else in the page's place.
    """
    text = report(read_metrics(metrics), context)
    page = page or metrics.with_suffix(".html")
    target = replaceable(page, Error)
    if target.exists():
        with target.open("rb") as old:
            if old.read(len(MARK)) != MARK.encode():
                raise Error(f"{target} is there and is no report; name another file with -o, or remove it")
    target.write_text(text, encoding="utf-8")
    return page


def report(found: MetricsFile, context: int | None = None) -> str:
    """The page. Raises: Error if there is no context of that number."""
    number_ = found.longest() if context is None else context
    if not 1 <= number_ <= len(found.runs):
        raise Error(f"there is no context {context} in {found.path}, only {len(found.runs)}, counted from 1")
    run = found.runs[number_ - 1]
    ends, pictures = charts(run)
    script = (FOLDER / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    time = spent(run)
    return (
        templates()
        .get_template("report.html")
        .render(
            mark=MARK,
            script=script,
            script_hash=f"sha256-{digest}",
            title=found.path.name,
            when=_when(run),
            tiles=_tiles(run),
            findings=findings(run),
            spent=_spent(time) if time and run.dynamic else None,
            charts=pictures,
            heat=heat_map(run.experts),
            moments=time_ticks(run.seconds),
            values={"ends": ends, "texts": [[series.texts for series in reversed(chart.series)] for chart in pictures]},
            counters=_counters(run),
            contexts=_contexts(found, number_) if len(found.runs) > 1 else [],
            notes=_notes(found, run),
            version=__version__,
        )
    )


def _when(run: Run) -> str:
    first, last = run.first.timestamp, run.last.timestamp
    day = "" if first.date() == last.date() else f"{last:%Y-%m-%d} "
    return f"{first:%Y-%m-%d %H:%M:%S} to {day}{last:%H:%M:%S} UTC, {duration(run.seconds)}"


def _tiles(run: Run) -> list[tuple[str, str, str]]:
    """What the run was: (what, how much, and what belongs to it)."""
    last = run.last
    tiles = [
        ("generated", f"{last.generated_tokens:,} tokens", f"after {last.prompt_tokens:,} of prompts"),
        ("speed", f"{number(last.avg_tokens_per_sec)} tokens/s", "while generating"),
    ]
    if not run.dynamic:
        return [*tiles, ("peak of the process", memory(last.mem_peak_bytes), "no dynamic layers, so no budget")]
    budgets = run.budgets
    budget = memory(run.peak.mem_budget_bytes) + (" then" if len(budgets) > 1 else "")
    tiles.append(("memory in use", memory(run.peak.used), f"at most, of {budget}"))
    if last.vram_budget_bytes:
        tiles.append(("on devices", memory(last.vram_own_bytes), f"at the end, of {memory(last.vram_budget_bytes)}"))
    time = spent(run)
    each = f"{memory(time.counts.read / time.per)} for each token" if time and time.per > 1 else "since the load began"
    tiles.append(("weights read", volume(last.weight_bytes_read), each))
    if time:
        of = "of generation" if time.per > 1 else "of the time"
        tiles.append(("waited for reads", duration(last.stall_ms / 1e3), f"{share(time.counts.stall_share)} {of}"))
    return tiles


def _spent(time: Spent) -> dict[str, Any]:
    parts = [(*_SPENT[name], seconds) for name, seconds in time.parts.items()]
    return {
        "of": time.of,
        "whole": duration(sum(time.parts.values())),
        "parts": bar((name, seconds, colour, duration(seconds)) for name, colour, seconds in parts),
        "tokens": time.per if time.per > 1 else 0,
    }


def _counters(run: Run) -> list[tuple[str, str]]:
    values = run.last.model_dump(mode="json", exclude={"experts"})  # which are drawn
    values.update({f"memory_by_tag: {tag}": n for tag, n in values.pop("memory_by_tag").items()})
    for kind, parts in (("sequence", values.pop("sequences")), ("device", values.pop("devices"))):
        for part in parts:
            values.update({f"{kind} {part.get(kind)}: {name}": n for name, n in part.items() if name != kind})
    return [(name, f"{v:,}" if isinstance(v, int) else str(v)) for name, v in values.items()]


def _contexts(found: MetricsFile, number_: int) -> list[dict[str, Any]]:
    return [
        {
            "number": i,
            "this": i == number_,
            "begin": f"{run.first.timestamp:%Y-%m-%d %H:%M:%S}",
            "seconds": duration(run.seconds),
            "prompt": f"{run.last.prompt_tokens:,}",
            "generated": f"{run.last.generated_tokens:,}",
            "speed": number(run.last.avg_tokens_per_sec),
        }
        for i, run in enumerate(found.runs, 1)
    ]


def _notes(found: MetricsFile, run: Run) -> list[str]:
    """What a reader has to know of the file."""
    notes = []
    if not run.ended:
        notes.append("The file ends before the context did: it was still there, or its process was ended.")
    if found.cut:
        notes.append("The last line is cut off, and was left out.")
    if found.n_skipped:
        lines = "1 line is" if found.n_skipped == 1 else f"{found.n_skipped:,} lines are"
        notes.append(f"{lines} no metrics, and left out.")
    others = [r for r in found.runs if r is not run and _overlap(r, run)]
    if others and run.dynamic:
        notes.append("Other contexts were there at the same time; those of one model share its memory and its reads.")
    return notes


def _overlap(a: Run, b: Run) -> bool:
    return a.first.timestamp <= b.last.timestamp and b.first.timestamp <= a.last.timestamp
