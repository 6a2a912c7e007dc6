#!/usr/bin/env python3
"""What a model does to the other programs of a desktop: how late a small periodic task is beside it.

bench/desktop.py --model MODEL.gguf [--percent 65] [--seconds 10]

The task wakes every 8 ms, as what draws a moving picture does, computes for 2 ms and notes how long after its time it
was done. It runs alone, and beside a model that decodes with all cores, streamed from disk, at several niceness values.
Prints a Markdown table: lateness, and what the model's speed was beside the task. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import programs
from bench.turns import TurnTaker
from superllama._openmp import short_spin
from superllama._plan import plan

CORES = 2
PERIOD_S = 0.008
WORK_S = 0.002
TASK = f"""
import json, sys, time
late, due = [], time.perf_counter() + {PERIOD_S}
end = due + float(sys.argv[1])
while due < end:
    time.sleep(max(0.0, due - time.perf_counter()))
    spent = time.thread_time() + {WORK_S}
    while time.thread_time() < spent:
        pass
    late.append(time.perf_counter() - due - {WORK_S})
    due = max(due + {PERIOD_S}, time.perf_counter())
print(json.dumps(sorted(late)))
"""


def lateness(seconds: float) -> list[float]:
    done = subprocess.run([sys.executable, "-c", TASK, str(seconds)], stdout=subprocess.PIPE, check=True)
    return [float(s) for s in json.loads(done.stdout)]


def row(name: str, late: list[float], speed: str) -> str:
    middle, most, worst = (late[int(len(late) * share)] * 1000 for share in (0.5, 0.99, 0.9999))
    missed = sum(s > PERIOD_S - WORK_S for s in late) / len(late)
    return f"| {name} | {middle:.2f} ms | {most:.2f} ms | {worst:.1f} ms | {missed:.1%} | {speed} |"


def beside(args: argparse.Namespace, budget: int, niceness: int) -> tuple[list[float], float]:
    """Lateness, and the model's tokens per second while the task ran."""
    command = [programs.find("probe"), "-m", args.model, "--n-prompt", 8, "-n", args.tokens, "-t", CORES, "--repack", 0]
    command += ["-c", args.tokens + 16, "--turns", 1, "--async-prefetch", "--mem-budget", budget]
    program = TurnTaker(command, dict(os.environ) | short_spin({}), lambda: os.nice(niceness) and None)
    program.ask()
    program.begin()
    time.sleep(0.5)
    late = lateness(args.seconds)
    rate = args.tokens / float(json.loads(program.answer())["decode_s"])
    program.close()
    return late, rate


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", type=Path, required=True)
    p.add_argument("--percent", type=int, default=65, help="of the file: the budget")
    p.add_argument("--seconds", type=float, default=10, help="that the task runs")
    p.add_argument("--tokens", type=int, default=60, help="of a turn; it has to last longer than the task")
    p.add_argument("--nice", type=int, nargs="+", default=[0, 5, 10, 19])
    args = p.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])

    size = args.model.stat().st_size * args.percent // 100
    budget = max(size, plan(args.model, mem_budget=size).mem_least_bytes)
    print("| beside it | late, median | 99 % | worst | later than its period | the model |")
    print("|---|---|---|---|---|---|")
    print(row("nothing", lateness(args.seconds), ""))
    for niceness in args.nice:
        late, rate = beside(args, budget, niceness)
        print(row(f"the model, nice {niceness}", late, f"{rate:.2f} tok/s"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
