"""Plots of how the file was read: gaps, layers, experts, what the page cache held."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from bench.plots import Rows, colour, config_label, varied

KINDS = ("0", "< 128 KB", "< 1 MB", ">= 1 MB", "backward")
KIND_COLOURS = ("#2a6f97", "#61a5c2", "#a9d6e5", "#d9a441", "#b5543a")
MOST_PANELS = 6


def _configs(rows: Rows) -> list[tuple[str, Rows]]:
    """Rows by configuration, most memory first."""
    names = varied(rows)
    out: dict[str, Rows] = {}
    for row in sorted(rows, key=lambda r: (r["scenario"] != "baseline", r["scenario"])):
        out.setdefault(config_label(row, names), []).append(row)
    return list(out.items())


def gaps(rows: Rows, model: str) -> Figure | None:
    """Two bars for every configuration: on the disk, and in the file."""
    configs = _configs(rows)
    if not configs:
        return None
    figure, axes = plt.subplots(figsize=(max(7.2, 1.5 * len(configs) + 2), 4.4))
    for i, (_, found) in enumerate(configs):
        for offset, space in ((-0.2, "physical"), (0.2, "logical")):
            bottom = 0.0
            for kind, hue in zip(KINDS, KIND_COLOURS, strict=True):
                share = 100 * sum(r["share"] for r in found if r["space"] == space and r["kind"] == kind)
                label = kind if i == 0 and space == "physical" else None
                axes.bar(i + offset, share, 0.36, bottom=bottom, color=hue, label=label)
                if share >= 6:
                    axes.text(i + offset, bottom + share / 2, f"{share:.0f}", ha="center", va="center", fontsize=8)
                bottom += share
            axes.text(i + offset, 101, "disk" if space == "physical" else "file", ha="center", fontsize=8)
    axes.set_xticks(range(len(configs)), [label for label, _ in configs], fontsize=8)
    axes.set_ylabel("requests, %")
    axes.set_ylim(0, 108)
    axes.set_title(f"Gap to the request before, on the disk and in the file: {model}")
    axes.legend(title="gap", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def dense_against_moe(rows: Rows) -> Figure | None:
    """rows: of sql/sequential.sql for all models, at the same scenarios."""
    if len({r["moe"] for r in rows}) < 2:
        return None
    engines = sorted({r["engine"] for r in rows})
    scenarios = list(dict.fromkeys(r["scenario"] for r in sorted(rows, key=lambda r: (r["scenario"] != "baseline",))))
    figure, panels = plt.subplots(
        1, len(engines), figsize=(max(7.2, 4.2 * len(engines)), 4), squeeze=False, sharey=True
    )
    for axes, engine in zip(panels[0], engines, strict=True):
        for offset, moe, hue in ((-0.2, False, "#2a6f97"), (0.2, True, "#d9a441")):
            values = []
            for scenario in scenarios:
                found = [r["logical_sequential"] for r in rows
                         if (r["engine"], r["scenario"], r["moe"]) == (engine, scenario, moe)]  # fmt: skip
                values.append(100 * float(np.mean(found)) if found else 0.0)
            bars = axes.bar(
                np.arange(len(scenarios)) + offset, values, 0.36, color=hue, label="MoE" if moe else "dense"
            )
            axes.bar_label(bars, fmt="%.0f", fontsize=8)
        axes.set_xticks(range(len(scenarios)), scenarios)
        axes.set_title(engine)
        axes.set_ylim(0, 112)
    panels[0][0].set_ylabel("requests with gap 0 in the file, %")
    panels[0][-1].legend()
    figure.suptitle("Sequential share, dense against MoE", fontsize=11)
    return figure


def residency(rows: Rows, model: str) -> Figure | None:
    """Heat maps, layer over time, of the share of each layer that the page cache holds."""
    configs = [c for c in _configs(rows) if c[1]][:MOST_PANELS]
    if not configs:
        return None
    n_columns = min(3, len(configs))
    n_rows = -(-len(configs) // n_columns)
    size = (max(7.2, 3.4 * n_columns), 2.9 * n_rows + 0.5)
    figure, panels = plt.subplots(n_rows, n_columns, figsize=size, squeeze=False)
    image = None
    for axes, (label, found) in zip(panels.flat, configs, strict=False):
        times = np.array(sorted({r["t_s"] for r in found}))
        layers = sorted({r["layer"] for r in found})
        grid = np.full((len(layers), len(times)), np.nan)
        for r in found:
            if r["cached_share"] is not None:
                grid[layers.index(r["layer"]), np.searchsorted(times, r["t_s"])] = 100 * r["cached_share"]
        edges = np.append(times, times[-1] + (times[-1] - times[0]) / max(1, len(times) - 1) + 0.01)
        image = axes.pcolormesh(edges, np.arange(len(layers) + 1) - 1.5, grid, vmin=0, vmax=100, cmap="viridis")
        if not np.nanmean(grid) > 1:
            axes.text(0.5, 0.5, "nothing: the engine\nreads past it", color="white", ha="center", va="center",
                      transform=axes.transAxes)  # fmt: skip
        axes.set_title(label.replace("\n", ", "), fontsize=9)
        axes.set_xlabel("time, s")
        axes.grid(False)
    for axes in panels[:, 0]:
        axes.set_ylabel("layer (-1: embedding, output)")
    for axes in panels.flat[len(configs) :]:
        axes.axis("off")
    if image is not None:
        figure.colorbar(image, ax=panels, label="share in the page cache, %")
    figure.suptitle(f"What the page cache held of the file: {model}", fontsize=11)
    return figure


def layers(rows: Rows, model: str) -> Figure | None:
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(7.2, 4))
    styles = dict(zip(sorted({r["scenario"] for r in rows}), ("-", "--", ":", "-.") * 5, strict=False))
    for label, found in _configs(rows):
        for source in sorted({r["source"] for r in found}):
            line = sorted((r for r in found if r["source"] == source), key=lambda r: r["layer"])
            width = 2.4 if (line[0]["swappiness"] or 0) == 0 else 1.2
            name = label.replace("\n", ", ") + (", our reader" if source == "reader" else "")
            axes.plot([r["layer"] for r in line], [r["times_read"] for r in line], styles[line[0]["scenario"]],
                      color=colour(line[0]["engine"]), label=name, marker=".", ms=4, lw=width, alpha=0.8)  # fmt: skip
    axes.set_xlabel("layer (-1: embedding, output)")
    axes.set_ylabel("bytes read / bytes of the layer, whole run")
    axes.set_ylim(bottom=0)
    axes.set_title(f"How often each layer was read: {model}")
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def experts(rows: Rows, model: str) -> Figure | None:
    """Heat maps, expert by layer, of how often each was read, at the least memory."""
    configs = [c for c in _configs(rows) if c[1][0]["scenario"] != "baseline"][-3:]
    if not configs:
        return None
    figure, panels = plt.subplots(1, len(configs), figsize=(max(7.2, 3.6 * len(configs)), 3.8), squeeze=False)
    for axes, (label, found) in zip(panels[0], configs, strict=True):
        grid = np.zeros((max(r["layer"] for r in found) + 1, max(r["expert"] for r in found) + 1))
        for r in found:
            grid[r["layer"], r["expert"]] = r["times_read"]
        image = axes.imshow(grid, aspect="auto", cmap="magma", origin="lower", vmin=0, interpolation="nearest")
        axes.set_title(label.replace("\n", ", "), fontsize=9)
        axes.set_xlabel("expert")
        axes.grid(False)
        figure.colorbar(image, ax=axes, label="times read, whole run")
    panels[0][0].set_ylabel("layer")
    figure.suptitle(f"How often each expert was read: {model}", fontsize=11)
    return figure
