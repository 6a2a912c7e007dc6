#!/usr/bin/env python3
"""Run the SSD-offloading study: how inference reads its weights when memory is short.

bench/run_experiment.py --model M.gguf --scenario baseline|50percent|100percent|700mb --tokens 100 --swappiness 60 \\
    --engine stock|superllama [engine flags after --]
bench/run_experiment.py --matrix bench/matrix/small.toml --vocab SmolLM2.gguf --models DIR --out RESULTS

Every run is a fresh process with a cold cache. What finished is not run again; bench/report.py RESULTS shows it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import disk_speed, engine, machine, matrix
from bench.job import Job
from bench.run_one import TIMEOUT_S, Model, run
from bench.sizes import format_size, parse_size
from bench.trace import mapping, table
from bench.undo import Journal


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path)
    p.add_argument("--scenario", default="baseline", help="baseline, 50percent, 100percent, 700mb: memory for weights")
    p.add_argument("--tokens", type=int, default=100)
    p.add_argument("--prompt-tokens", type=int, default=16)
    p.add_argument("--swappiness", type=int, help="0, 60, 100; as found without it")
    p.add_argument("--read-ahead", type=int, metavar="KB", help="of the disk; as found without it")
    p.add_argument("--engine", default="stock", help=f"one of engines.toml: {', '.join(engine.load())}")
    p.add_argument("--repeats", type=int, default=3)
    p.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1))
    p.add_argument("--headroom", type=parse_size, default=64 << 20, help="memory beside the weights, 64MiB")
    p.add_argument("--pressure", choices=["auto", "cgroup", "locker", "none"], default="auto")
    p.add_argument("--block-tracer", choices=["auto", "tracefs", "blktrace", "none"], default="auto")
    p.add_argument("--reader-trace", type=Path, help="where the engine writes its own trace (default: told to it)")
    p.add_argument("--matrix", type=Path, help="a TOML file with models x scenarios x swappiness x engines")
    p.add_argument("--vocab", type=Path, help="for models that the matrix describes: a GGUF with a vocabulary")
    p.add_argument("--models", type=Path, default=Path("models"), help="folder for models that are made")
    p.add_argument("--out", type=Path, default=Path("results"))
    p.add_argument("--build", type=Path, help="build folder with the programs (default: build/)")
    p.add_argument("--timeout", type=float, default=TIMEOUT_S, metavar="S", help="of one run")
    p.add_argument("--check", action="store_true", help="only say what this machine has and what is missing")
    p.add_argument("flags", nargs="*", help="flags for the engine, after --")
    return p.parse_args(argv)


def plan(a: argparse.Namespace) -> list[Job]:
    if a.matrix:
        m = matrix.load(a.matrix)
        for name in m.engines:
            engine.get(name)
        matrix.make_models(m, a.models, a.vocab)
        return m.jobs(a.models)
    if a.model is None:
        raise ValueError("nothing to run: give --model FILE or --matrix FILE")
    if not a.model.is_file():
        raise FileNotFoundError(f"model {a.model} does not exist")
    engine.get(a.engine)
    jobs = [Job(str(a.model), a.scenario, a.engine, a.tokens, a.prompt_tokens, a.swappiness, a.read_ahead, a.threads,
                tuple(a.flags), a.pressure, a.block_tracer, a.headroom, i) for i in range(a.repeats)]  # fmt: skip
    jobs[0].budget(1)
    return jobs


def show(result: dict) -> str:
    what = f"{result['key']}: {result['status']}"
    if result["status"] == "ok":
        per_token = result["decode_read_bytes"] / max(1, result["tokens"])
        what += f", {result['decode_tokens_per_s']:.2f} tokens/s, {format_size(per_token)} read per token"
    elif result["error"]:
        what += f": {result['error'].splitlines()[-1][:200]}"
    return what


def execute(jobs: list[Job], a: argparse.Namespace, console: Console) -> int:
    """Returns the number of runs that were made now."""
    runs = a.out / "runs"
    todo = [job for job in jobs if not (runs / job.key / "run.json").is_file()]
    if len(todo) < len(jobs):
        console.print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are there already: not repeated")
    models: dict[str, Model] = {}
    told: set[str] = set()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    with Journal() as journal, Progress(*columns, console=console) as progress:
        task = progress.add_task("runs", total=len(todo))
        for job in todo:
            progress.update(task, description=job.key.rpartition("-")[0])
            if job.model not in models:
                models[job.model] = Model.open(Path(job.model))
                (a.out / "models").mkdir(parents=True, exist_ok=True)
                ranges = mapping.ranges_table(models[job.model].where)
                table.save(ranges, a.out / "models" / f"{Path(job.model).stem}.parquet")
                disk_speed.note(a.out / "disk_speed.jsonl", Path(job.model))
            outcome = run(job, models[job.model], journal, runs / job.key, a.build, a.reader_trace, a.timeout)
            for line in outcome.skipped:
                if line not in told:
                    told.add(line)
                    console.print(f"skipped: {line}")
            console.print(show(outcome.result), highlight=False)
            progress.advance(task)
    return len(todo)


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    console = Console(stderr=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `with` blocks are left
    try:
        jobs = plan(a)
        a.out.mkdir(parents=True, exist_ok=True)
        checks = machine.check(sorted({Path(j.model) for j in jobs}), a.out)
        for check in checks:
            console.print(check.line(), highlight=False, markup=False)
        about = machine.describe() | {"checks": machine.as_dicts(checks)}
        if a.check:
            return 0
        (a.out / "machine.json").write_text(json.dumps(about, indent=1) + "\n")
        execute(jobs, a, console)
    except (ValueError, OSError, RuntimeError) as error:
        console.print(f"run_experiment: {error}", style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on with what is missing")
        return 130
    console.print(f"done: {a.out}; now bench/report.py {a.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
