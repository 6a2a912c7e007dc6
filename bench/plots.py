"""Plots of speed, bytes and stalls. Every function draws one figure and returns it, or None when there is nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

Rows = list[dict[str, Any]]

COLOURS = {"stock": "#b5543a", "stock-default": "#d9a441", "stock-direct": "#8c6d5a", "superllama": "#2a6f97",
           "superllama-repack": "#014f86", "superllama-sync": "#61a5c2", "superllama-lru": "#89c2d9"}  # fmt: skip
BOUND = "#555555"

plt.rcParams.update({
    "figure.dpi": 110, "savefig.dpi": 110, "font.size": 10, "axes.titlesize": 11, "axes.grid": True, "grid.alpha": 0.3,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "figure.constrained_layout.use": True,
})  # fmt: skip


def colour(engine: str) -> str:
    return COLOURS.get(engine, "#5c8a4a")


def scenario_order(row: dict[str, Any]) -> float:
    """Most memory first."""
    return -float("inf") if row.get("budget_bytes") is None else -float(row["budget_bytes"])


def config_label(row: dict[str, Any], varied: tuple[str, ...] = ()) -> str:
    text = f"{row['scenario']}\n{row['engine']}"
    names = {"swappiness": "swappiness {}", "read_ahead_kb": "read-ahead {} KB"}
    for name in varied:
        if row.get(name) is not None:
            text += "\n" + names[name].format(row[name])
    return text


def varied(rows: Rows) -> tuple[str, ...]:
    """Settings that differ between the rows, to be named in labels."""
    return tuple(n for n in ("swappiness", "read_ahead_kb") if len({r.get(n) for r in rows}) > 1)


def series(rows: Rows) -> dict[str, Rows]:
    """Rows by line of a plot: the engine, and the settings where they differ."""
    names = varied(rows)
    out: dict[str, Rows] = {}
    for row in rows:
        label = config_label(row, names).partition("\n")[2].replace("\n", ", ")
        out.setdefault(label, []).append(row)
    return out


def _against_memory(
    rows: Rows, title: str, ylabel: str, value: Callable[[dict], float | None],
    spread: Callable[[dict], tuple[float, float] | None] | None = None,
) -> tuple[Figure, plt.Axes]:  # fmt: skip
    """Memory for the weights as a share of the model on the x axis; no limit is drawn at the right end."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2))
    shares = [100 * r["budget_bytes"] / r["model_bytes"] for r in rows if r["budget_bytes"]]
    unlimited = max([*shares, 100]) + 15
    for index, (label, line) in enumerate(series(rows).items()):
        points = []
        for row in line:
            x = 100 * row["budget_bytes"] / row["model_bytes"] if row["budget_bytes"] else unlimited
            y = value(row)
            if y is None and row["n_oom"]:
                axes.plot([x], [0], "x", color=colour(row["engine"]), markersize=9, mew=2, clip_on=False)
                axes.annotate("out of\nmemory", (x, 0), xytext=(4, 6), textcoords="offset points", fontsize=8)
            elif y is not None:
                points.append((x, y, spread(row) if spread else None))
        points.sort(key=lambda p: p[0])
        style = ["-", "--", ":", "-."][index // max(1, len({r["engine"] for r in rows})) % 4]
        hue = colour(line[0]["engine"])
        limited = [p for p in points if p[0] < unlimited]
        axes.plot([p[0] for p in limited], [p[1] for p in limited], style, marker="o", color=hue, label=label)
        # not joined to the others: "no limit" is no point of the axis
        axes.plot([p[0] for p in points[len(limited) :]], [p[1] for p in points[len(limited) :]], "D", color=hue)
        if spread and points:
            low, high = ([p[1] - p[2][0] for p in points], [p[2][1] - p[1] for p in points])
            axes.errorbar(
                [p[0] for p in points], [p[1] for p in points], [low, high], fmt="none", ecolor=hue, capsize=3
            )
    ticks = sorted({round(s) for s in shares})
    axes.set_xticks([*ticks, unlimited], [*[f"{t} %" for t in ticks], "no limit"])
    axes.set_xlabel("memory for the weights, share of the model's size")
    axes.set_ylabel(ylabel)
    axes.set_title(title)
    axes.set_ylim(bottom=0)
    return figure, axes


def speed(rows: Rows, model: str, bandwidth: float | None, moe: bool) -> Figure | None:
    """rows: of sql/speed.sql for one model. The bound min(compute, B/(S-M)) holds for dense models."""
    figure, axes = _against_memory(
        rows, f"Speed against memory: {model}", "tokens/s, decode (median; bars: min to max)",
        lambda r: r["tokens_per_s"], lambda r: (r["tokens_per_s_min"], r["tokens_per_s_max"]),
    )  # fmt: skip
    compute = max((r["tokens_per_s"] for r in rows if r["budget_bytes"] is None and r["tokens_per_s"]), default=None)
    if bandwidth and compute and not moe:
        size = rows[0]["model_bytes"]
        x = np.linspace(min((r["budget_bytes"] / size for r in rows if r["budget_bytes"]), default=0.5), 1.15, 200)
        bound = np.minimum(compute, bandwidth / np.maximum(size * (1 - x), 1))
        label = f"bound: min(compute, B/(S-M)), B = {bandwidth / 1e9:.2f} GB/s"
        axes.plot(100 * x, bound, color=BOUND, lw=1.2, ls=(0, (4, 3)), label=label)
    axes.legend(loc="upper left")
    return figure


def bytes_per_token(rows: Rows, model: str) -> Figure | None:
    size = rows[0]["model_bytes"]
    figure, axes = _against_memory(
        rows, f"Bytes read per generated token: {model}", "MB read per token (median)",
        lambda r: None if r["bytes_per_token"] is None else r["bytes_per_token"] / 1e6,
    )  # fmt: skip
    axes.axhline(size / 1e6, color=BOUND, lw=1, ls=":")
    axes.set_ylim(top=1.12 * max([size / 1e6, *((r["bytes_per_token"] or 0) / 1e6 for r in rows)]))
    axes.annotate("the whole model", (0.99, size / 1e6), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                  fontsize=8)  # fmt: skip
    axes.legend(loc="center right")
    return figure


def swappiness(rows: Rows, model: str) -> Figure | None:
    values = sorted({r["swappiness"] for r in rows if r["swappiness"] is not None})
    if len(values) < 2:
        return None
    groups = {f"{r['scenario']}\n{r['engine']}": None for r in sorted(rows, key=scenario_order)}
    figure, axes = plt.subplots(figsize=(7.2, 4))
    width = 0.8 / len(values)
    for i, value in enumerate(values):
        found = {f"{r['scenario']}\n{r['engine']}": r for r in rows if r["swappiness"] == value}
        heights = [(found[g]["tokens_per_s"] or 0) if g in found else 0 for g in groups]
        x = np.arange(len(groups)) + (i - (len(values) - 1) / 2) * width
        bars = axes.bar(x, heights, width * 0.92, label=f"swappiness {value}", color=plt.cm.viridis(0.15 + 0.7 * i / 2))
        axes.bar_label(bars, fmt="%.2f", fontsize=8)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_ylabel("tokens/s, decode (median)")
    axes.set_title(f"Swappiness: {model}")
    axes.legend()
    return figure


def stalls(rows: Rows, model: str) -> Figure | None:
    if not rows:
        return None
    rows = sorted(rows, key=lambda r: (r["scenario"] != "baseline", r["scenario"], r["engine"]))
    labels = [config_label(r, varied(rows)) for r in rows]
    kinds = {"CPU busy, user": lambda r: r["cpu_share"] * (1 - (r["kernel_share_of_cpu"] or 0)),
             "CPU busy, kernel": lambda r: r["cpu_share"] * (r["kernel_share_of_cpu"] or 0)}  # fmt: skip
    figure, axes = plt.subplots(figsize=(max(7.2, 1.1 * len(rows)), 4.2))
    bottom = np.zeros(len(rows))
    for (label, value), hue in zip(kinds.items(), ("#2a6f97", "#89c2d9"), strict=True):
        heights = np.array([100 * (value(r) or 0) for r in rows])
        axes.bar(np.arange(len(rows)) - 0.2, heights, 0.36, bottom=bottom, label=label, color=hue)
        bottom += heights
    for offset, name, label, hue in ((0.08, "memory_stall_share", "all waited for memory (PSI)", "#d9a441"),
                                     (0.26, "io_stall_share", "all waited for I/O (PSI)", "#b5543a")):  # fmt: skip
        axes.bar(np.arange(len(rows)) + offset, [100 * (r[name] or 0) for r in rows], 0.17, label=label, color=hue)
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set_ylabel("share of the run, %")
    axes.set_ylim(0, 118)
    axes.set_title(f"CPU and stall time: {model}")
    axes.legend(ncols=2, loc="upper center", fontsize=8)
    return figure
