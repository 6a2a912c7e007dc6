#!/usr/bin/env python3
"""Stock llama.cpp against superllama with less memory than the model needs, in one run of alternating fresh processes.

bench/bigger_than_memory.py MODEL.gguf [--budgets 25 50 75 90 110] [--read-ahead as-found 128] [--out FOLDER]

Writes FOLDER/result.json, table.md and plot.png. The disk's speed is measured before and after every run, by the read
path that superllama uses and on the file that the run streams from: the model, or its repacked blocks, which lie in
MODEL.cache beside it. An engine that is killed for memory is a result. What finished is not run again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import bigger_report, disk_speed, engine, machine
from bench.job import HEADROOM, Job
from bench.run_experiment import show
from bench.run_one import TIMEOUT_S, Model, run
from bench.sizes import parse_size
from bench.undo import Journal

AGAIN = ("--again", "1")  # the first prompt loads, and says how long until the first token; the second is its speed


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--budgets", type=int, nargs="+", default=[25, 50, 75, 90, 110], help="percent of the model's size")
    p.add_argument("--engines", nargs="+", default=["stock", "stock-default", "stock-direct", "superllama"],
                   help=f"of engines.toml: {', '.join(engine.load())}")  # fmt: skip
    p.add_argument("--read-ahead", nargs="+", default=["as-found"], help="as-found, or KB such as 128 (needs root)")
    p.add_argument("--tokens", type=int, default=16)
    p.add_argument("--prompt-tokens", type=int, default=64)
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument(
        "--headroom", type=parse_size, default=HEADROOM, help="of the cgroup above the budget, for all engines"
    )
    p.add_argument("--pressure", choices=["auto", "cgroup", "locker"], default="auto")
    p.add_argument("--timeout", type=float, default=TIMEOUT_S)
    p.add_argument("--out", type=Path, default=Path("results-bigger"))
    p.add_argument("--build", type=Path)
    return p.parse_args(argv)


def plan(a: argparse.Namespace) -> list[list[Job]]:
    """One list of jobs per repeat, every second one backwards. `baseline` gives the speed of compute."""
    ahead = [None if v == "as-found" else int(v) for v in a.read_ahead]
    scenarios = ["baseline", *(f"{b}percent" for b in a.budgets)]
    rounds = []
    for repeat in range(a.repeats):
        jobs = [
            Job(str(a.model), s, name, a.tokens, a.prompt_tokens, None, kb, a.threads, AGAIN, a.pressure, "none",
                a.headroom, repeat)
            for s in scenarios for kb in (ahead if s != "baseline" else ahead[:1]) for name in a.engines
        ]  # fmt: skip
        rounds.append(jobs if repeat % 2 == 0 else jobs[::-1])
    return rounds


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    console = Console(stderr=True)
    try:
        for name in a.engines:
            engine.get(name)
        if not a.model.is_file():
            raise FileNotFoundError(f"model {a.model} does not exist; bench/make_model.py makes one")
        rounds = plan(a)
        (a.out / "runs").mkdir(parents=True, exist_ok=True)
        checks = machine.check([a.model], a.out)
        for check in checks:
            console.print(check.line(), highlight=False, markup=False)
        (a.out / "machine.json").write_text(
            json.dumps(machine.describe() | {"checks": machine.as_dicts(checks)}, indent=1)
        )
        measure(rounds, a, console)
        text = bigger_report.write(a.out, Model.open(a.model).where, a)
    except (ValueError, OSError, RuntimeError) as error:
        console.print(f"bigger_than_memory: {error}", style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on with what is missing")
        return 130
    print(text)
    return 0


def note_disk_speed(a: argparse.Namespace, job: Job) -> None:
    """Before and after each run: a disk's speed wanders, and is not the same everywhere."""
    disk_speed.note(a.out / "disk_speed.jsonl", engine.get(job.engine).file(a.model), run=job.key)


def measure(rounds: list[list[Job]], a: argparse.Namespace, console: Console) -> None:
    model = Model.open(a.model)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Journal() as journal, Progress(*columns, console=console) as progress:
        task = progress.add_task("runs", total=sum(len(r) for r in rounds))
        for jobs in rounds:
            todo = [job for job in jobs if not (a.out / "runs" / job.key / "run.json").is_file()]
            progress.advance(task, len(jobs) - len(todo))
            if todo:
                disk_speed.measure(a.model)  # once for caches below this system, which warm up
            for job in todo:
                progress.update(task, description=job.key.rpartition("-")[0])
                note_disk_speed(a, job)
                outcome = run(job, model, journal, a.out / "runs" / job.key, a.build, None, a.timeout, light=True)
                note_disk_speed(a, job)
                console.print(show(outcome.result), highlight=False)
                progress.advance(task)


if __name__ == "__main__":
    sys.exit(main())
