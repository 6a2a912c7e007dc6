#!/usr/bin/env python3
"""Show the results of a study: bench/report.py RESULTS writes report.html, summary.md and plots/ into it.

The page holds its images: one file, readable without network.
"""

from __future__ import annotations

import argparse
import base64
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import jinja2
import matplotlib.pyplot as plt

from bench import answers, plots, plots_pattern
from bench.analysis import Results
from bench.sizes import format_size

HEAD = ("memory", "engine", "settings", "tokens/s", "min - max", "n", "prompt tokens/s", "first token s",
        "read per token", "peak memory", "killed")  # fmt: skip


def of_model(rows: list[dict], model: str) -> list[dict]:
    return [r for r in rows if r["model_name"] == model]


def draw(results: Results) -> list[tuple[str, str, Any]]:
    """(file name, title, figure)"""
    tables = {name: results.query(name) for name in
              ("speed", "gaps", "layers", "experts", "residency", "stalls", "sequential")}  # fmt: skip
    moe = {r["model_name"]: r["moe"] for r in tables["sequential"]}
    out: list[tuple[str, str, Any]] = []
    for model in sorted({r["model_name"] for r in results.runs}):
        part = {name: of_model(rows, model) for name, rows in tables.items()}
        is_moe = moe.get(model, bool(part["experts"]))
        figures = {
            "speed": ("Speed against memory", plots.speed(part["speed"], model, results.disk_speed(model), is_moe)),
            "bytes": ("Bytes read per token", plots.bytes_per_token(part["speed"], model)),
            "gaps": ("Gaps before and after extent mapping", plots_pattern.gaps(part["gaps"], model)),
            "residency": ("What the page cache held", plots_pattern.residency(part["residency"], model)),
            "layers": ("Reads per layer", plots_pattern.layers(part["layers"], model)),
            "experts": ("Reads per expert", plots_pattern.experts(part["experts"], model)),
            "stalls": ("CPU and stall time", plots.stalls(part["stalls"], model)),
            "swappiness": ("Swappiness", plots.swappiness(part["speed"], model)),
        }
        out += [(f"{name}-{model}.png", f"{title}: {model}", f) for name, (title, f) in figures.items() if f]
    both = plots_pattern.dense_against_moe(tables["sequential"])
    if both:
        out.append(("dense-moe.png", "Dense against MoE", both))
    return out


def number(value: float | None, form: str = "{:.2f}") -> str:
    return "" if value is None else form.format(value)


def speed_table(results: Results, model: str) -> list[list[str]]:
    rows = []
    for r in sorted(of_model(results.query("speed"), model), key=lambda r: (plots.scenario_order(r), r["engine"])):
        setting = ", ".join(f"{label} {r[name]}" for name, label in
                            (("swappiness", "swappiness"), ("read_ahead_kb", "read-ahead KB"))
                            if r[name] is not None)  # fmt: skip
        memory = r["scenario"] + (f" ({format_size(r['budget_bytes'])})" if r["budget_bytes"] else "")
        failed = r["n"] - r["n_ok"]
        killed = f"{r['n_oom']} of {r['n']}" if r["n_oom"] else f"failed {failed} of {r['n']}" if failed else ""
        low_high = f"{r['tokens_per_s_min']:.2f} - {r['tokens_per_s_max']:.2f}" if r["n_ok"] else ""
        rows.append([
            memory, r["engine"], setting, number(r["tokens_per_s"]), low_high, str(r["n_ok"]),
            number(r["prompt_tokens_per_s"], "{:.1f}"), number(r["first_token_s"]),
            "" if r["bytes_per_token"] is None else format_size(r["bytes_per_token"]),
            "" if r["peak_bytes"] is None else format_size(r["peak_bytes"]), killed,
        ])  # fmt: skip
    return rows


def machine_line(results: Results) -> str:
    m = results.machine()
    runs = f"{len(results.runs)} runs, {sum(r['status'] == 'ok' for r in results.runs)} complete."
    if not m:
        return runs
    return (
        f"{m['cpu']}, {m['cores']} cores, {format_size(m['memory_bytes'])} memory, {m['system']} {m['kernel']}. {runs}"
    )


def failures(results: Results) -> list[str]:
    """What ended badly, and what was left out, each once."""
    lines = {f"{r['engine']}, {r['scenario']}: {r['status']}: {(r['error'].splitlines() or [''])[-1]}": None
             for r in results.runs if r["status"] not in ("ok", "oom")}  # fmt: skip
    return [*lines, *{line: None for r in results.runs for line in r.get("skipped", [])}]


def write(folder: Path) -> Path:
    results = Results(folder)
    title = "How inference reads its weights when memory is short"
    models = sorted({r["model_name"] for r in results.runs})
    tables = []
    for model in models:
        size = next(r["model_bytes"] for r in results.runs if r["model_name"] == model)
        speed = results.disk_speed(model)
        disk = f", disk {format_size(speed)}/s" if speed else ""
        tables.append(
            {"title": f"{model}: {format_size(size)}{disk}", "head": HEAD, "rows": speed_table(results, model)}
        )
    questions = []
    for question, answer in answers.QUESTIONS:
        text = answer(results)
        items = [line[2:] for line in text.splitlines() if line.startswith("- ")]
        questions.append({"title": question, "text": text, "points": items})
    images = []
    (folder / "plots").mkdir(exist_ok=True)
    for name, caption, figure in draw(results):
        figure.savefig(folder / "plots" / name)
        plt.close(figure)
        data = base64.b64encode((folder / "plots" / name).read_bytes()).decode()
        images.append({"title": caption, "data": data, "file": f"plots/{name}"})
    checks = results.machine().get("checks", [])
    template = jinja2.Environment(autoescape=True).from_string(
        Path(__file__).with_name("report.html.jinja").read_text()
    )
    page = template.render(title=title, machine=machine_line(results), tables=tables, images=images,
                           questions=questions, checks=checks, skipped=failures(results))  # fmt: skip
    (folder / "report.html").write_text(page)
    lines = [f"# {title}", "", machine_line(results)]
    for t in tables:
        lines += ["", f"## {t['title']}", "", "| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
        lines += ["| " + " | ".join(row) + " |" for row in t["rows"]]
    for q in questions:
        lines += ["", f"## {q['title']}", "", q["text"]]
    if failures(results):
        lines += ["", "## Failed or skipped", "", *[f"- {line}" for line in failures(results)]]
    (folder / "summary.md").write_text("\n".join(lines) + "\n")
    return folder / "report.html"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    try:
        page = write(parser.parse_args().results)
    except FileNotFoundError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(f"{page}, {page.with_name('summary.md')}, {page.parent / 'plots'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
