"""The open questions of the original study, answered with this study's numbers, or with what is missing for it."""

from __future__ import annotations

from bench.analysis import Results
from bench.sizes import format_size


def _percent(x: float) -> str:
    return f"{100 * x:.1f} %"


def swappiness(results: Results) -> str:
    rows = [r for r in results.query("speed") if r["swappiness"] is not None and r["tokens_per_s"]]
    pattern = {_config(r): r for r in results.query("sequential")}
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["model_name"], row["scenario"], row["engine"]), []).append(row)
    groups = {k: v for k, v in groups.items() if len(v) > 1}
    if not groups:
        return "Not measured: the results hold one swappiness only; run bench/matrix/swappiness.toml."
    lines = []
    for (model, scenario, engine), found in sorted(groups.items()):
        parts = []
        for r in sorted(found, key=lambda r: r["swappiness"]):
            p = pattern.get(_config(r))
            share = f", {_percent(p['logical_sequential'])} sequential" if p else ""
            parts.append(f"{r['swappiness']}: {r['tokens_per_s']:.2f} tokens/s{share} (n = {r['n_ok']})")
        lines.append(f"- {model}, {scenario}, {engine}: " + "; ".join(parts))
    swap = next((c for c in results.machine().get("checks", []) if c["what"] == "swap"), None)
    if swap and not swap["ok"]:
        lines.append("- This machine has no swap: nothing but the page cache could give way, whatever the swappiness.")
    return "\n".join(lines)


def moe_against_dense(results: Results) -> str:
    rows = results.query("sequential")
    if len({r["moe"] for r in rows}) < 2:
        return "Not measured: block traces of both a dense and a MoE model are needed."
    return "\n".join(
        f"- {'MoE' if r['moe'] else 'dense'} ({r['model_name']}), {r['scenario']}, {r['engine']}{_settings(r)}: "
        f"{_percent(r['logical_sequential'])} of the requests and {_percent(r['logical_sequential_bytes'])} of the "
        f"bytes follow the request before, {_percent(r['logical_backward'])} of the requests go back; "
        f"median request {format_size(r['request_bytes'])}"
        for r in rows
    )


def extents(results: Results) -> str:
    rows = results.query("sequential")
    if not rows:
        return "Not measured: no run has a block trace."
    count = {c["what"].removeprefix("extents of ").removesuffix(".gguf"): c["found"]
             for c in results.machine().get("checks", []) if c["what"].startswith("extents of")}  # fmt: skip
    return "\n".join(
        f"- {r['model_name']} (extents: {count.get(r['model_name'], 'not known')}), {r['scenario']}, {r['engine']}"
        f"{_settings(r)}: gap 0 for {_percent(r['physical_sequential'])} of the requests on the disk and "
        f"{_percent(r['logical_sequential'])} in the file; backward {_percent(r['physical_backward'])} and "
        f"{_percent(r['logical_backward'])}"
        for r in rows
    )


def submission(results: Results) -> str:
    rows = results.query("bandwidth")
    if not rows:
        return "Not measured: no run has a block trace."
    return "\n".join(
        f"- {r['model_name']}, {r['scenario']}, {r['engine']}{_settings(r)}: busiest 100 ms "
        f"{format_size(r['submitted_peak_per_s'])}/s submitted, {format_size(r['completed_peak_per_s'])}/s completed; "
        f"requests that the full device refused and that were issued again: {_percent(r['requeued_share'] or 0)} "
        "of the bytes read (left out here, counted again by a plain count of issues)"
        for r in rows
    )


def agreement(results: Results) -> str:
    rows = results.query("agreement")
    if not rows:
        return "No run has both a block trace and the process's counters."
    process = [r["block_to_process"] for r in rows if r["block_to_process"]]
    disk = [r["block_to_disk"] for r in rows if r["block_to_disk"]]
    lost = sum(r["trace_lost"] or 0 for r in rows)
    far = sum(abs(x - 1) > 0.05 for x in process)
    return (
        f"Bytes of the block trace over /proc/PID/io: {min(process):.3f} to {max(process):.3f} over {len(process)} "
        f"runs ({far} of them more than 5 % apart); over the disk's own count, which includes other processes: "
        f"{min(disk):.3f} to {max(disk):.3f}. The trace holds reads of the model's file only; the process also reads "
        f"its program and libraries. Events lost by the tracer: {lost}."
    )


QUESTIONS = (
    ("How does swappiness change the pattern?", swappiness),
    ("Do MoE models read less sequentially?", moe_against_dense),
    ("What is the sequential share once extents are taken into account?", extents),
    ("Is the submission rate the bandwidth?", submission),
    ("Do independent counters agree?", agreement),
)


def _config(r: dict) -> tuple:
    return r["model_name"], r["scenario"], r["engine"], r["swappiness"], r["read_ahead_kb"]


def _settings(r: dict) -> str:
    text = "" if r["swappiness"] is None else f", swappiness {r['swappiness']}"
    return text + ("" if r["read_ahead_kb"] is None else f", read-ahead {r['read_ahead_kb']} KB")
