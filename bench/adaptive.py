#!/usr/bin/env python3
"""Take memory away in the middle of a run, and give it back: is anything killed, how fast is it meanwhile, after?

bench/adaptive.py MODEL.gguf [--limit 110] [--take 40] [--from 10 --for 10] [--tokens 200] [--out FOLDER]

A program in the run's own cgroup locks --take percent of the model's size for some seconds. A second run is left alone:
tokens take longer as a text grows, so that the speed after is compared with its speed at the same tokens. A third has
from its start the budget that the first one had meanwhile. Writes FOLDER/adaptive.json and adaptive.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench import engine, page_cache, plots, programs
from bench.pressure import Pressure, pressure, start_locker
from bench.run_one import wait
from bench.sizes import format_size
from bench.undo import Journal, start_time

AFTER_TOKENS = 10  # until speed must be back

Point = tuple[float, int, int, int]  # Unix time, tokens generated, resident bytes of weights, budget


def run(a: argparse.Namespace, take: bool) -> tuple[dict, list[Point]]:
    page_cache.evict(a.model)
    marks: dict[str, float] = {}
    limit = a.model.stat().st_size * a.limit // 100
    with tempfile.TemporaryDirectory() as folder, Journal() as journal, pressure(journal, limit, "cgroup") as p:
        metrics = Path(folder) / "metrics.jsonl"
        command = engine.get(a.engine).command(a.model, a.tokens, 16, None, a.threads, (), a.build)
        command += ["--metrics-file", str(metrics), "--metrics-interval", "100"]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=p.enter)
        with journal.process(child):
            locked, code = hold(a, p, journal, marks) if take else (0, None)
            wait(child, a.timeout)
        printed, errors = child.communicate()
        result = {"model": a.model.name, "limit_bytes": p.limit, "locked_bytes": locked, "locker_exit": code,
                  "exit_code": child.returncode, "oom_kills": p.oom_kills(), "peak_bytes": p.peak(), "marks": marks,
                  "result": engine.parse_output(printed), "error": errors.strip()[-500:]}  # fmt: skip
        return result, samples(metrics) if metrics.exists() else []


def hold(a: argparse.Namespace, p: Pressure, journal: Journal, marks: dict[str, float]) -> tuple[int, int | str]:
    """Takes the memory for a while: bytes locked, and the program's exit code or its complaint."""
    size = a.model.stat().st_size
    time.sleep(a.start)
    locker = [str(programs.find("mem_locker", a.build)), str(size * a.take // 100), str(256 << 20)]
    marks["taken"] = time.time()
    try:
        holder, locked = start_locker(locker, p.enter)
        journal.add("process", pid=holder.pid, start=start_time(holder.pid))
        time.sleep(a.seconds)
        holder.stdin.close()
        return locked, holder.wait()
    except RuntimeError as error:
        return 0, str(error)
    finally:
        marks["given_back"] = time.time()


def run_steadily(a: argparse.Namespace, budget: int, limit: int) -> float | None:
    """tokens/s with this budget from the start; None if the run died."""
    command = engine.get("superllama").command(a.model, 40, 16, budget, a.threads, (), a.build)
    page_cache.evict(a.model)
    with Journal() as journal, pressure(journal, limit, "cgroup") as p:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, preexec_fn=p.enter
        )
        with journal.process(child):
            wait(child, a.timeout)
        printed = engine.parse_output(child.communicate()[0])
        return len(printed["tokens"]) / printed["decode_s"] if printed else None


def samples(metrics: Path) -> list[Point]:
    out = []
    for line in metrics.read_text().splitlines():
        with contextlib.suppress(ValueError, KeyError):
            m = json.loads(line)
            t = datetime.fromisoformat(m["timestamp"].replace("Z", "+00:00")).timestamp()
            out.append((t, m["generated_tokens"], m["weight_bytes_resident"], m["mem_budget_bytes"]))
    return out


def speeds(points: list[Point]) -> list[tuple[float, float]]:
    """(time, tokens/s) between samples that are at least half a second apart."""
    out = []
    last = points[0] if points else None
    for point in points[1:]:
        if point[0] - last[0] >= 0.5:
            out.append(((point[0] + last[0]) / 2, (point[1] - last[1]) / (point[0] - last[0])))
            last = point
    return out


def judge(result: dict, points: list[Point], alone: list[Point]) -> dict:
    """Median speeds: before, meanwhile, AFTER_TOKENS tokens after the memory is back, left alone at the same tokens."""
    taken, back = result["marks"]["taken"], result["marks"]["given_back"]
    settled = max((n for t, n, *_ in points if t <= back), default=0) + AFTER_TOKENS

    def of(some: list[Point]) -> float | None:
        found = [v for _, v in speeds(some) if v > 0]
        return median(found) if found else None

    return {"before": of([x for x in points if x[0] < taken]),
            "meanwhile": of([x for x in points if taken + 1 <= x[0] < back]),
            "after": of([x for x in points if x[1] >= settled]),
            "left_alone": of([x for x in alone if x[1] >= settled]),
            "budget_meanwhile": int(median(b for t, _, _, b in points if taken + 1 <= t < back))}  # fmt: skip


def draw(result: dict, points: list[Point], path: Path) -> None:
    t0 = points[0][0]
    figure, axes = plt.subplots(figsize=(8, 4.2))
    axes.axvspan(result["marks"]["taken"] - t0, result["marks"]["given_back"] - t0, color="#d9a441", alpha=0.25, lw=0,
                 label=f"another process holds {format_size(result['locked_bytes'])}")  # fmt: skip
    series = speeds(points)
    axes.plot([t - t0 for t, _ in series], [v for _, v in series], color=plots.colour("superllama"), label="tokens/s")
    axes.set_xlabel("time, s")
    axes.set_ylabel("tokens/s")
    axes.set_ylim(bottom=0)
    axes.set_title(f"Memory taken away and given back: {result['model']}")
    right = axes.twinx()
    right.plot([t - t0 for t, *_ in points], [b / 1e6 for _, _, b, _ in points], color="#777777", lw=1, ls="--")
    right.plot([], [], color="#777777", lw=1, ls="--")
    right.set_ylabel("resident weights, MB (dashed)")
    right.set_ylim(bottom=0)
    right.grid(False)
    right.spines["right"].set_visible(True)
    axes.legend(loc="lower right")
    figure.savefig(path)
    plt.close(figure)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--engine", default="superllama-auto")
    p.add_argument("--limit", type=int, default=110, help="of the cgroup, percent of the model's size")
    p.add_argument("--take", type=int, default=40, help="what the other process locks, percent of the model's size")
    p.add_argument("--from", dest="start", type=float, default=10, help="seconds")
    p.add_argument("--for", dest="seconds", type=float, default=10, help="seconds")
    p.add_argument("--tokens", type=int, default=200)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--timeout", type=float, default=600)
    p.add_argument("--out", type=Path, default=Path("results-bigger"))
    p.add_argument("--build", type=Path)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    try:
        result, points = run(a, take=True)
        if len(speeds(points)) < 2:
            raise RuntimeError(
                f"too few samples ({len(points)}): generate more --tokens; the run said: {result['error']}"
            )
        _, alone = run(a, take=False)
    except (RuntimeError, ValueError, FileNotFoundError) as error:
        print(f"adaptive: {error}", file=sys.stderr)
        return 1
    result |= judge(result, points, alone)
    result["from_the_start"] = run_steadily(a, result["budget_meanwhile"], result["limit_bytes"])
    (a.out / "adaptive.json").write_text(json.dumps(result | {"samples": points}, indent=1) + "\n")
    draw(result, points, a.out / "adaptive.png")
    for name in ("before", "meanwhile", "from_the_start", "after", "left_alone"):
        print(
            f"{name.replace('_', ' ')}: {result[name]:.2f} tokens/s"
            if result[name] is not None
            else f"{name}: not measured"
        )
    print(f"killed: {result['oom_kills']}, exit code {result['exit_code']}, peak {format_size(result['peak_bytes'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
