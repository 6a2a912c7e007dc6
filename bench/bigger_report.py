"""The table, the plot and the JSON of bigger_than_memory.py."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from bench import bound, engine, plots
from bench.sizes import format_size
from bench.trace.tensors import TensorMap


@dataclass
class Row:
    """One configuration over its repeats. Speeds are medians, tokens/s; None = no run of it finished."""

    scenario: str
    budget_bytes: int | None
    engine: str
    read_ahead_kb: int | None
    n: int
    n_ok: int
    n_oom: int
    decode: float | None
    decode_min: float | None
    decode_max: float | None
    prompt: float | None
    first_token_s: float | None
    bytes_per_token: float | None
    stall_s: float | None
    peak_bytes: int | None
    over_budget_bytes: int | None  # peak - budget
    bytes_per_s: float | None = None  # B, measured before and after each of the runs
    bound: float | None = None
    reached: float | None = None
    reached_of_file: float | None = None  # dense: of the bound with S = the file's size
    bytes_to_misses: float | None = None  # bytes read / (experts read x bytes of one), whole run
    hashes: int = 0  # different hashes over all logits; 1 = every run agrees
    error: str = ""


def _median(values: list) -> float | None:
    known = [v for v in values if v is not None]
    return float(median(known)) if known else None


def _row(runs: list[dict]) -> Row:
    first, ok = runs[0], [r for r in runs if r["status"] == "ok"]
    metrics = [r["metrics"] for r in ok if r.get("metrics")]
    speeds = [r["decode_tokens_per_s"] for r in ok]
    peaks = [r["peak_bytes"] for r in runs if r["peak_bytes"]]
    peak = max(peaks, default=None)
    budget = first["budget_bytes"]
    errors = [r["error"].splitlines()[-1] for r in runs if r["error"] and r["status"] != "oom"]
    return Row(
        first["scenario"], budget, first["engine"], first["read_ahead_kb"], len(runs), len(ok),
        sum(r["status"] == "oom" for r in runs), _median(speeds), min(speeds, default=None), max(speeds, default=None),
        _median([r["prompt_tokens_per_s"] for r in ok]), _median([r["first_token_s"] for r in ok]),
        _median([r["decode_read_bytes"] / r["tokens"] for r in ok]),
        _median([m["stall_ms"] / 1000 for m in metrics if m.get("stall_ms")]),
        peak, peak - budget if peak and budget else None, hashes=len({r["hash"] for r in ok}),
        error=errors[-1] if errors else "",
    )  # fmt: skip


def in_memory(rows: list[Row], repacked: bool) -> float | None:
    """Tokens/s with everything in memory: of the fastest engine with these kernels."""
    alike = [r for r in rows if r.budget_bytes is None and engine.get(r.engine).repacks == repacked]
    return max((r.decode for r in alike if r.decode), default=None)


def _set_bound(row: Row, runs: list[dict], where: TensorMap, speeds: dict[str, float], compute: float) -> None:
    """What bounds each of the runs, with B as it was around it, and how much of that it reached: medians."""
    row.bytes_per_s = _median([speeds[r["key"]] for r in runs])
    all_runs = bound.Limits(bound.needed_bytes(where), bound.expert_bytes(where), row.bytes_per_s, compute)
    bounds, reached, reached_of_file, bytes_to_misses = [], [], [], []
    for r in runs:
        decode, metrics = r.get("decode_tokens_per_s"), r.get("metrics") or {}
        limits = replace(all_runs, bytes_per_s=speeds[r["key"]])
        if not decode or (limits.moe and not metrics.get("expert_misses")):
            continue
        if limits.moe:
            # the counter of misses has the prompt's in it, which would lower the bound: the bytes read while decoding,
            # less those of wrong guesses
            reads = metrics["expert_misses"] + metrics.get("expert_guesses", 0)
            right = (metrics["expert_misses"] + metrics.get("expert_guesses_used", 0)) / reads
            bounds.append(limits.experts(right * r["decode_read_bytes"] / r["tokens"] / limits.expert_bytes))
            bytes_to_misses.append(r["total_read_bytes"] / (reads * limits.expert_bytes))
        else:
            bounds.append(limits.dense(r["budget_bytes"]))
            of_file = replace(limits, needed_bytes=where.file_bytes)
            reached_of_file.append(decode / of_file.dense(r["budget_bytes"]))
        reached.append(decode / bounds[-1])
    row.bound, row.reached = _median(bounds), _median(reached)
    row.reached_of_file, row.bytes_to_misses = _median(reached_of_file), _median(bytes_to_misses)


def rows_of(runs: list[dict], where: TensorMap, measured: list[dict]) -> list[Row]:
    groups: dict[tuple, list[dict]] = {}
    for r in runs:
        groups.setdefault((r["scenario"], r["engine"], r["read_ahead_kb"]), []).append(r)
    rows = [_row(group) for group in groups.values()]
    speeds = {r["key"]: mean(m["bytes_per_s"] for m in measured if m["run"] == r["key"]) for r in runs}
    for row, group in zip(rows, groups.values(), strict=True):
        compute = in_memory(rows, engine.get(row.engine).repacks)
        if row.budget_bytes is not None and compute is not None:
            _set_bound(row, group, where, speeds, compute)
    order = {e: i for i, e in enumerate(engine.load())}
    return sorted(rows, key=lambda r: (-(r.budget_bytes or 1 << 60), r.read_ahead_kb or 0, order.get(r.engine, 99)))


HEAD = ("budget", "engine", "read-ahead", "decode tokens/s", "min - max", "n", "prompt tokens/s", "first token s",
        "read per token", "stall s", "peak memory", "disk", "bound", "reached", "of file's", "killed")  # fmt: skip


def markdown(rows: list[Row]) -> str:
    def show(value: float | None, form: str) -> str:
        return "" if value is None else form.format(value)

    lines = ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    for r in rows:
        ended = f"{r.n_oom} of {r.n}" if r.n_oom else f"{r.n - r.n_ok} of {r.n}: {r.error[:80]}" if r.n_ok < r.n else ""
        budget = (
            "no limit"
            if r.budget_bytes is None
            else f"{r.scenario.removesuffix('percent')} %, " + format_size(r.budget_bytes)
        )
        cells = (
            budget, r.engine, "as found" if r.read_ahead_kb is None else f"{r.read_ahead_kb} KB",
            show(r.decode, "{:.2f}"),
            "" if r.decode_min is None else f"{r.decode_min:.2f} - {r.decode_max:.2f}", str(r.n_ok),
            show(r.prompt, "{:.1f}"), show(r.first_token_s, "{:.2f}"),
            "" if r.bytes_per_token is None else format_size(r.bytes_per_token), show(r.stall_s, "{:.2f}"),
            "" if r.peak_bytes is None else format_size(r.peak_bytes),
            "" if r.bytes_per_s is None else format_size(r.bytes_per_s) + "/s",
            show(r.bound, "{:.2f}"), show(r.reached, "{:.2f}"), show(r.reached_of_file, "{:.2f}"), ended,
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[Row], where: TensorMap, speed: float, title: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(9.5, 4.8))
    size = where.file_bytes
    told: set[str] = set()
    for (name, ahead), style in _lines(rows).items():
        line = [r for r in rows if r.engine == name and r.read_ahead_kb == ahead and r.budget_bytes]
        done = sorted((r for r in line if r.decode), key=lambda r: r.budget_bytes or 0)
        x = [100 * (r.budget_bytes or 0) / size for r in done]
        label = name + ("" if ahead is None else f", read-ahead {ahead} KB")
        if done:
            axes.plot(x, [r.decode for r in done], style, marker="o", color=plots.colour(name), label=label)
        spread = [[r.decode - r.decode_min for r in done], [r.decode_max - r.decode for r in done]]
        axes.errorbar(x, [r.decode for r in done], spread, fmt="none", ecolor=plots.colour(name), capsize=3)
        killed = [100 * (r.budget_bytes or 0) / size for r in line if r.n_oom and not r.decode]
        if killed:
            axes.plot(killed, [0] * len(killed), "x", color=plots.colour(name), mew=2, ms=8, clip_on=False,
                      label=None if name in told else f"{name}: killed for memory")  # fmt: skip
            told.add(name)
    compute = {repacked: in_memory(rows, repacked) for repacked in (False, True)}
    shares = [100 * r.budget_bytes / size for r in rows if r.budget_bytes]
    if not bound.expert_bytes(where) and shares:
        x = np.linspace(min(shares) - 2, max(shares) + 3, 300)
        for repacked, hue in ((False, "#555555"), (True, "#aaaaaa")):
            if compute[repacked]:
                limits = bound.Limits(bound.needed_bytes(where), 0, speed, compute[repacked])
                label = f"bound, {'with' if repacked else 'without'} repacking"
                y = [limits.dense(int(size * s / 100)) for s in x]
                axes.plot(x, y, ls=(0, (4, 3)), lw=1.2, color=hue, label=label)
    axes.set_xticks(sorted({round(s) for s in shares}), [f"{s} %" for s in sorted({round(s) for s in shares})])
    axes.set_xlabel(f"memory budget, share of the model's {format_size(size)}")
    axes.set_ylabel("tokens/s, decode (median; bars: min to max)")
    axes.set_title(f"{title}: speed against memory (B = {speed / 1e9:.2f} GB/s)")
    axes.set_ylim(bottom=0)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path)
    plt.close(figure)


def _lines(rows: list[Row]) -> dict[tuple[str, int | None], str]:
    aheads = sorted({r.read_ahead_kb for r in rows}, key=lambda v: v or 0)
    keys = dict.fromkeys((r.engine, r.read_ahead_kb) for r in rows if r.budget_bytes)
    return {k: ("-", "--", ":", "-.")[aheads.index(k[1]) % 4] for k in keys}


def write(out: Path, where: TensorMap, a: argparse.Namespace) -> str:
    runs = [json.loads(p.read_text()) for p in sorted(out.glob("runs/*/run.json"))]
    runs = [r for r in runs if Path(r["model"]).name == a.model.name]
    measured = [json.loads(line) for line in (out / "disk_speed.jsonl").read_text().splitlines()]
    speed = float(median(m["bytes_per_s"] for m in measured))
    rows = rows_of(runs, where, measured)
    about = json.loads((out / "machine.json").read_text())
    b = [m["bytes_per_s"] for m in measured]
    needed = format_size(bound.needed_bytes(where))
    head = (
        f"{a.model.name}: {format_size(where.file_bytes)}, of which a token needs {needed}; "
        f"{about['cpu']}, {about['cores']} cores, Linux {about['kernel']}; B = {format_size(speed)}/s "
        f"({format_size(min(b))} to {format_size(max(b))} over {len(b)} measurements, O_DIRECT, "
        f"{measured[0]['threads']} threads x {format_size(measured[0]['block_bytes'])}); "
        f"memory limit = budget + {format_size(a.headroom)}; load average at the start {about['load']:.1f}"
    )
    text = f"{head}\n\n{markdown(rows)}\n"
    (out / "table.md").write_text(text)
    data = {"model": a.model.name, "model_bytes": where.file_bytes, "needed_bytes": bound.needed_bytes(where),
            "expert_bytes": bound.expert_bytes(where), "bytes_per_s": speed, "machine": about, "disk_speed": measured,
            "rows": [asdict(r) for r in rows], "runs": runs}  # fmt: skip
    (out / "result.json").write_text(json.dumps(data, indent=1) + "\n")
    draw(rows, where, speed, a.model.stem, out / "plot.png")
    return text
