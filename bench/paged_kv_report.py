"""The tables and the plot of paged_kv.py, of the runs that are there."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench import plots
from bench.sizes import format_size

HOW = {
    "resume-in-memory": "stock, all in memory",
    "resume-host-cache": "stock, host prompt cache",
    "resume-paged": "paged",
    "resume-paged-async": "paged, --async-prefetch",
}
Runs = dict[str, dict]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def spread(values: list[float], unit: str) -> str:
    return f"{median(values):.1f} {unit} ({min(values):.1f}-{max(values):.1f})"


# ---------------------------------------------------------------------------------------------------- tables


def memory(runs: Runs) -> str:
    stock, paged = runs["memory-stock"], runs["memory-paged"]
    paged_at = dict(paged["grown"])
    rows = []
    for tokens, rss in stock["grown"]:
        if tokens and tokens & (tokens - 1):
            continue  # powers of two are enough
        a, b = rss - stock["rss_before"], paged_at[tokens] - paged["rss_before"]
        rows.append([str(tokens), format_size(a), format_size(b), f"{100 * b / a:.1f} %"])
    return table(["tokens used", "stock", "paged", "share"], rows)


def resume(runs: Runs) -> str:
    rows, reference = [], None
    for name, label in HOW.items():
        if name not in runs:
            continue
        r = runs[name]
        reference = reference or r["answers"]
        limit = format_size(r["limit_bytes"]) if r["limit_bytes"] else "none"
        faster = median(r["fill_s"]) / median(r["resume_s"])
        same = "same" if r["answers"] == reference else "DIFFERENT"
        times = spread([1000 * s for s in r["resume_s"]], "ms")
        rows.append([label, format_size(r["peak_bytes"] or r["rss_filled"]), limit, times, f"{faster:.0f}x", same])
    again = [s for name in HOW if name in runs for s in runs[name]["fill_s"]]
    rows.append(["stock, computing the prompt again", "", "", spread([1000 * s for s in again], "ms"), "1x", "same"])
    return table(["how", "peak memory", "limit", "to the next token", "against computing again", "answers"], rows)


def decode(runs: Runs) -> str:
    rows = []
    for what in ("prompt", "decode"):
        r = runs["decode"][what]
        ratio = median(q / p for p, q in zip(r["off"], r["on"], strict=True))
        low, high = r["ratio_95"]
        same = "identical" if runs["decode"]["identical"] else "DIFFERENT"
        rows.append([what, f"{median(r['off']):.1f} tok/s", f"{median(r['on']):.1f} tok/s",
                     f"{ratio:.4f} ({low:.4f}-{high:.4f})", same])  # fmt: skip
    return table(["what", "standard cache", "paged, nothing evicted", "ratio (95 %)", "logits"], rows)


def oversized(runs: Runs) -> str:
    rows = []
    found = [r for name, r in runs.items() if name.startswith("oversized-")]
    found.sort(key=lambda r: -1000 if r["percent"] is None else -r["percent"])
    for r in found:
        label = "stock" if r["percent"] is None else f"{r['percent']} % = {format_size(r['budget_bytes'])}"
        if r["percent"] is not None and not r["async"]:
            label += ", no --async-prefetch"
        rows.append([
            label, f"{r['n_prompt'] / r['prompt_s']:.1f} tok/s", f"{len(r['tokens']) / r['decode_s']:.2f} tok/s",
            "identical" if r["hash"] == found[0]["hash"] else "DIFFERENT",
        ])  # fmt: skip
    return table(["budget, share of the sequence's cache", "prompt", "decode", "logits"], rows)


# ------------------------------------------------------------------------------------------------------ plot


def draw(runs: Runs, path: Path) -> None:
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4))
    for name, label in (("stock", "stock"), ("paged", "superllama")):
        if r := runs.get(f"memory-{name}"):
            points = [(n, (rss - r["rss_before"]) / 1e6) for n, rss in r["grown"]]
            left.plot(*zip(*points, strict=True), color=plots.colour(label), marker=".", label=name)
    left.set(xlabel="tokens used", ylabel="MB beside the model", title="Memory of one large context", yscale="log")

    found = [(label, runs[name]) for name, label in HOW.items() if name in runs]
    bars = [(label, 1000 * median(r["resume_s"])) for label, r in found]
    bars += [("computing again", 1000 * median([s for _, r in found for s in r["fill_s"]]))] if found else []
    hues = [plots.colour("stock" if not label.startswith("paged") else "superllama") for label, _ in bars]
    middle.barh([label.replace(", ", ",\n") for label, _ in bars], [ms for _, ms in bars], color=hues)
    middle.set(xlabel="ms to the next token", title="Resuming an idle conversation", xscale="log")
    middle.invert_yaxis()

    points = sorted((r["percent"], len(r["tokens"]) / r["decode_s"], r["n_prompt"] / r["prompt_s"])
                    for r in runs.values() if r.get("percent") and r["async"])  # fmt: skip
    if points and (stock := runs.get("oversized-stock")):
        for i, what, s in ((1, "decode", len(stock["tokens"]) / stock["decode_s"]),
                           (2, "prompt", stock["n_prompt"] / stock["prompt_s"])):  # fmt: skip
            right.plot([p[0] for p in points], [100 * p[i] / s for p in points], marker="o", label=what)
    right.set(
        xlabel="budget, % of the sequence's cache", ylabel="speed, % of stock", title="One sequence over the budget"
    )
    right.set_ylim(bottom=0)
    for axes in (left, right):
        if axes.lines:
            axes.legend()
    figure.savefig(path)
    plt.close(figure)


TABLES = {
    "Memory of one large context": (memory, ("memory-stock", "memory-paged")),
    "Resuming idle conversations": (resume, ("resume-in-memory",)),
    "Nothing evicted": (decode, ("decode",)),
    "One sequence over the budget": (oversized, ("oversized-stock",)),
}


def write(folder: Path) -> str:
    """Writes table.md and plot.png; returns the tables."""
    runs = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    text = "\n".join(
        f"### {title}\n\n{make(runs)}" for title, (make, needs) in TABLES.items() if all(n in runs for n in needs)
    )
    (folder / "table.md").write_text(text)
    draw(runs, folder / "plot.png")
    return text
