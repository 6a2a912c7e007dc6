#!/usr/bin/env python3
"""A machine that does other things too: decoding beside busy processes, and within a quota of CPU time.

bench/busy.py --dense DENSE.gguf --moe MOE.gguf [--rounds 3] [--seconds 6]

Every engine stays loaded and takes short turns in every condition. The measure is the share of the cores that is left:
one thread alone on the quiet machine is one core's share, a busy process takes a core, or its fair part where there
are more processes than cores. Prints Markdown tables. Needs two cores; quotas also need root and a cgroup for CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import programs
from superllama._openmp import short_spin
from superllama._plan import plan

V1, V2 = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
PERIOD_US = 100_000
CORES = 2  # that the programs may run on, and their threads


class Quota:
    """A cgroup whose members together have so many cores' time; None: as much as they want."""

    def __init__(self) -> None:
        self.v1 = (V1 / "cpu.cfs_quota_us").exists() or (V1 / "cgroup.procs").exists()
        self.path = (V1 if self.v1 else V2) / f"superllama-bench-cpu-{os.getpid()}"
        self.path.mkdir()

    def set(self, cores: float | None) -> None:
        quota = None if cores is None else int(cores * PERIOD_US)
        if self.v1:
            (self.path / "cpu.cfs_quota_us").write_text(str(-1 if quota is None else quota))
        else:
            (self.path / "cpu.max").write_text(f"{'max' if quota is None else quota} {PERIOD_US}")

    def enter(self) -> None:
        (self.path / "cgroup.procs").write_text("0")

    def close(self) -> None:
        self.path.rmdir()


@dataclass
class Engine:
    """A probe that decodes the same prompt at every turn, for about the seconds asked for."""

    name: str
    program: str
    model: Path
    flags: list[str]
    threads: int = CORES
    spin: bool = True  # as our programs and our package set it
    n: int = 16
    rates: dict[str, list[float]] = field(default_factory=dict)
    hashes: set[str] = field(default_factory=set)

    def start(self, quota: Quota | None, most: int) -> None:
        command = [programs.find(self.program), "-m", self.model, "--n-prompt", 8, "-n", self.n, "-t", self.threads]
        command += ["-c", most + 16, "--turns", 1, *self.flags]
        environment = dict(os.environ) | (short_spin({}) if self.spin else {})
        self.child = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            preexec_fn=quota.enter if quota else None,
        )  # fmt: skip

    def turn(self) -> dict[str, float]:
        assert self.child.stdin and self.child.stdout
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        out: dict[str, float] = json.loads(self.child.stdout.readline())
        return out

    def close(self) -> None:
        self.child.communicate()


@contextlib.contextmanager
def busy(n: int) -> Iterator[None]:
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try:
        time.sleep(1)
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@dataclass(frozen=True)
class Condition:
    name: str
    others: int = 0
    quota: float | None = None

    def share(self) -> float:
        """Of one core's speed, that which is left."""
        alone = min(1.0, CORES / (self.others + 1)) if self.others else 1.0
        return alone if self.quota is None else min(alone, self.quota)


def engines(args: argparse.Namespace) -> list[Engine]:
    def budget(model: Path, percent: float) -> list[str]:
        size = int(model.stat().st_size * percent / 100)
        least = plan(model, mem_budget=size).mem_least_bytes
        return ["--mem-budget", str(max(size, least)), "--async-prefetch"]

    found = []
    for kind, model, percent in (("dense", args.dense, 65), ("MoE", args.moe, 30)):
        if model is None:
            continue
        some, adapt = [*budget(model, percent), "--repack", "0"], ["--adapt-threads"]
        found += [
            Engine(f"{kind}, in memory, stock", "probe-stock", model, ["--repack", "0"], spin=False),
            Engine(f"{kind}, in memory, no flag", "probe", model, ["--repack", "0"]),
            Engine(
                f"{kind}, in memory, --adapt-threads on", "probe", model, ["--repack", "0", "--adapt-threads", "on"]
            ),
            Engine(f"{kind}, {percent} %, --adapt-threads off", "probe", model, [*some, *adapt, "off"]),
            Engine(f"{kind}, {percent} %", "probe", model, some),
            Engine(f"{kind}, in memory, one thread", "probe", model, ["--repack", "0"], threads=1),
            Engine(f"{kind}, {percent} %, one thread", "probe", model, some, threads=1),
        ]
    return found


def one_core(engine: Engine, everyone: list[Engine]) -> Engine:
    """The engine with one thread that has the same weights in memory."""
    return next(e for e in everyone if e.name == ", ".join(engine.name.split(", ")[:2]) + ", one thread")


def measure(args: argparse.Namespace, everyone: list[Engine], conditions: list[Condition], quota: Quota | None) -> None:
    tokens = {}
    for engine in everyone:  # so many tokens as fill a turn on the quiet machine, with one thread
        engine.n = 8
        engine.start(quota, engine.n)
        engine.turn()
        out = engine.turn()
        engine.close()
        rate = engine.n / out["decode_s"]
        tokens[engine.name] = max(8, int(rate * args.seconds))
    for engine in everyone:
        engine.n = max(8, min(tokens[engine.name], args.most))
        engine.start(quota, args.most)
        engine.turn()  # loads what was not loaded
    for _ in range(args.rounds):
        for condition in conditions:
            with busy(condition.others):
                for engine in everyone:
                    if engine.threads == 1 and condition.name != "quiet":
                        continue
                    if quota:
                        quota.set(condition.quota)
                    out = engine.turn()
                    engine.hashes.add(str(out["hash"]))
                    engine.rates.setdefault(condition.name, []).append(engine.n / out["decode_s"])
                    if quota:
                        quota.set(None)
    for engine in everyone:
        engine.close()


def table(everyone: list[Engine], conditions: list[Condition]) -> None:
    print(f"| tok/s (of what is left) | {' | '.join(c.name for c in conditions)} | logits |")
    print("|---|" + "---|" * (len(conditions) + 1))
    for engine in everyone:
        alone = statistics.median(one_core(engine, everyone).rates["quiet"])
        cells = []
        for condition in conditions:
            rates = engine.rates.get(condition.name)
            if not rates:
                cells.append("")
                continue
            rate = statistics.median(rates)
            cells.append(f"{rate:.1f} ({rate / (alone * condition.share()):.2f}; {min(rates):.1f} to {max(rates):.1f})")
        same = "one hash" if len(engine.hashes) == 1 else f"{len(engine.hashes)} HASHES"
        print(f"| {engine.name} | {' | '.join(cells)} | {same} |")


def recovery(args: argparse.Namespace, everyone: list[Engine]) -> None:
    """How long after the end of a busy process all threads compute again, from the metrics lines of a long turn."""
    for engine in everyone:
        if engine.threads == 1 or "--adapt-threads off" in engine.name or engine.name.endswith(("stock", "no flag")):
            continue
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "metrics"
            once = Engine(engine.name, engine.program, engine.model, [*engine.flags, "--metrics-file", str(lines),
                          "--metrics-interval", "50"], n=min(args.most, 3 * engine.n))  # fmt: skip
            once.start(None, args.most)
            assert once.child.stdin
            once.child.stdin.write("\n")
            once.child.stdin.flush()
            with busy(1):
                time.sleep(args.seconds / 2)
            ended = time.time()
            once.close()
            seen = [json.loads(line) for line in lines.read_text().splitlines()]
            times = [(datetime.fromisoformat(s["timestamp"].replace("Z", "+00:00")).timestamp(), s) for s in seen]
            least = min(s["threads"] for t, s in times if t < ended)
            back = [t - ended for t, s in times if t > ended and s["threads"] == CORES]
            when = f"{back[0]:.2f} s" if back else "not before the end of the text"
            print(f"{engine.name}: {least} thread beside the busy process; {CORES} again after {when}")


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dense", type=Path)
    p.add_argument("--moe", type=Path)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=6, help="of a turn on the quiet machine")
    p.add_argument("--most", type=int, default=480, help="tokens of a turn")
    p.add_argument("--no-quota", action="store_true")
    args = p.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])

    conditions = [Condition("quiet"), Condition("one busy", 1), Condition("two busy", 2)]
    quota = None if args.no_quota else Quota()
    if quota:
        conditions += [Condition("quota 1.0", quota=1.0), Condition("quota 1.5", quota=1.5)]
    everyone = engines(args)
    try:
        measure(args, everyone, conditions, quota)
    finally:
        if quota:
            time.sleep(0.5)
            quota.close()
    table(everyone, conditions)
    recovery(args, everyone)
    return 0


if __name__ == "__main__":
    sys.exit(main())
