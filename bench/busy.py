#!/usr/bin/env python3
"""A machine that does other things too: decoding beside busy processes, and within a quota of CPU time.

bench/busy.py --dense DENSE.gguf --moe MOE.gguf --kv SMALL.gguf [--rounds 3] [--seconds 6]

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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import programs
from bench.cgroup import Group, group
from bench.turns import TurnTaker
from bench.undo import Journal
from superllama._openmp import short_spin
from superllama._plan import plan

CORES = 2  # that the programs may run on, and their threads


@dataclass(frozen=True)
class Condition:
    name: str
    others: int = 0
    quota: float | None = None

    def share(self) -> float:
        """Of one core's speed, that which is left."""
        return min(1.0, CORES / (self.others + 1), self.quota or 1.0)


QUIET = Condition("quiet")
OTHERS = [Condition("one busy", 1), Condition("two busy", 2)]
QUOTAS = [Condition("quota 1.0", quota=1.0), Condition("quota 1.5", quota=1.5)]


@dataclass
class Engine:
    """A probe of a model with some flags; a turn decodes the same prompt, and so many tokens as take a while."""

    name: str
    model: Path
    flags: Sequence[str] = ()
    program: str = "probe"
    threads: int = CORES
    spins_briefly: bool = True  # as our programs and our package set it
    adapts: bool = False  # its threads follow the cores that are left
    n: int = 8
    rates: dict[str, list[float]] = field(default_factory=dict)
    hashes: set[str] = field(default_factory=set)

    def start(self, most: int, inside: Group | None = None, flags: Sequence[str] = ()) -> TurnTaker:
        command = [programs.find(self.program), "-m", self.model, "--repack", 0, "--n-prompt", 8, "-n", self.n]
        command += ["-t", self.threads, "-c", most + 16, "--turns", 1, *self.flags, *flags]
        environment = dict(os.environ) | (short_spin({}) if self.spins_briefly else {})
        return TurnTaker(command, environment, inside.enter if inside else None)

    def rate(self, answer: str) -> float:
        out = json.loads(answer)
        self.hashes.add(out["hash"])
        return self.n / float(out["decode_s"])

    def fit(self, seconds: float, most: int) -> None:
        """So many tokens as take that long on the quiet machine."""
        program = self.start(most)
        program.ask()  # loads what was not loaded
        rate = self.rate(program.ask())
        program.close()
        self.hashes.clear()  # of another number of tokens
        self.n = max(8, min(int(rate * seconds), most))


@dataclass
class Resumes(Engine):
    """Idle conversations, of which the budget holds a third: a turn resumes each of them, in order."""

    program: str = "conversations"
    n: int = 9
    tokens: int = 2000

    def start(self, most: int, inside: Group | None = None, flags: Sequence[str] = ()) -> TurnTaker:
        command = [programs.find(self.program), "-m", self.model, "-n", self.n, "--tokens", self.tokens]
        command += ["-c", -(-(self.tokens + 32) // 256) * 256, "-t", self.threads, "--turns", 1, *self.flags, *flags]
        environment = dict(os.environ) | (short_spin({}) if self.spins_briefly else {})
        return TurnTaker(command, environment, inside.enter if inside else None)

    def rate(self, answer: str) -> float:
        out = json.loads(answer)
        self.hashes.add(str(out["next"]))
        return self.n / sum(out["resume_s"])

    def fit(self, seconds: float, most: int) -> None:
        pass


@dataclass
class Weights:
    """The same weights with different flags, and what one thread alone makes of them."""

    engines: list[Engine]
    one_thread: Engine

    def all(self) -> list[Engine]:
        return [*self.engines, self.one_thread]


def kinds(kind: str, model: Path, percent: int) -> list[Weights]:
    def engine(where: str, label: str, *flags: str, **how: Any) -> Engine:
        return Engine(f"{kind}, {where}{label}", model, flags, **how)

    size = model.stat().st_size * percent // 100
    budget = ["--mem-budget", str(max(size, plan(model, mem_budget=size).mem_least_bytes)), "--async-prefetch"]
    adapt = "--adapt-threads"
    whole, part = "in memory", f"{percent} %"
    return [
        Weights(
            [
                engine(whole, ", stock", program="probe-stock", spins_briefly=False),
                engine(whole, ", no flag"),
                engine(whole, f", {adapt} on", adapt, "on", adapts=True),
            ],
            engine(whole, ", one thread", threads=1),
        ),
        Weights(
            [
                engine(part, f", {adapt} off", *budget, adapt, "off"),
                engine(part, "", *budget, adapts=True),
            ],
            engine(part, ", one thread", *budget, threads=1),
        ),
    ]


def idle_conversations(model: Path) -> Weights:
    room = Resumes.n // 3 * kv_bytes(model, Resumes.tokens + 1)

    def engine(label: str, *flags: str, **how: Any) -> Resumes:
        pages = ["--paged-kv", "--async-prefetch", "--kv-budget", str(room)]
        return Resumes(f"resumes from pages{label}", model, [*pages, *flags], **how)

    adapt = "--adapt-threads"
    return Weights([engine(f", {adapt} off", adapt, "off"), engine(""), engine(f", {adapt} on", adapt, "on")],
                   engine(", one thread", threads=1))  # fmt: skip


def kv_bytes(model: Path, tokens: int) -> int:
    """Of whole pages."""
    command = [programs.find("conversations"), "-m", model, "--paged-kv"]
    command += ["-n", 1, "--tokens", 1, "-c", 256, "--answer", 1]
    seen = json.loads(subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True).stdout)
    return int(-(-tokens // seen["page_size"]) * seen["page_bytes"])


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


def measure(engines: list[Engine], conditions: list[Condition], inside: Group | None, args: argparse.Namespace) -> None:
    for engine in engines:
        engine.fit(args.seconds, args.most)
    running = [(engine, engine.start(args.most, inside)) for engine in engines]
    for _, program in running:
        program.ask()
    for _ in range(args.rounds):
        for condition in conditions:
            with busy(condition.others):
                for engine, program in running:
                    if engine.threads == 1 and condition is not QUIET:
                        continue
                    if inside:
                        inside.set_quota(condition.quota)
                    engine.rates.setdefault(condition.name, []).append(engine.rate(program.ask()))
                    if inside:
                        inside.set_quota(None)
    for _, program in running:
        program.close()


def print_table(found: list[Weights], conditions: list[Condition]) -> None:
    print(f"| tok/s, resumes/s (of what is left) | {' | '.join(c.name for c in conditions)} | logits |")
    print("|---|" + "---|" * (len(conditions) + 1))
    for weights in found:
        alone = statistics.median(weights.one_thread.rates[QUIET.name])
        for engine in weights.all():
            cells = [cell(engine.rates.get(c.name, []), alone * c.share()) for c in conditions]
            same = "one hash" if len(engine.hashes) == 1 else f"{len(engine.hashes)} HASHES"
            print(f"| {engine.name} | {' | '.join(cells)} | {same} |")


def cell(rates: list[float], left: float) -> str:
    if not rates:
        return ""
    rate = statistics.median(rates)
    return f"{rate:.1f} ({rate / left:.2f}; {min(rates):.1f} to {max(rates):.1f})"


def when(line: dict[str, Any]) -> float:
    """Unix time of a metrics line; Python 3.10 does not read the Z."""
    return datetime.fromisoformat(line["timestamp"].replace("Z", "+00:00")).timestamp()


def recovery(engine: Engine, args: argparse.Namespace) -> str:
    """How long after the end of a busy process all threads compute again, from the metrics lines of a long turn."""
    engine.n = min(args.most, 4 * engine.n)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "metrics"
        program = engine.start(args.most, flags=["--metrics-file", str(file), "--metrics-interval", "50"])
        program.begin()
        with busy(1):
            time.sleep(args.seconds)
        ended = time.time()
        program.close()
        lines = [json.loads(line) for line in file.read_text().splitlines()]
    threads = [(when(line) - ended, line["threads"]) for line in lines]
    least = min(n for t, n in threads if t < 0)
    back = next((f"{t:.2f} s" for t, n in threads if t > 0 and n == CORES), "the end of the text")
    return f"{engine.name}: {least} of {CORES} threads beside a busy process, all of them again after {back}"


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dense", type=Path, help="measured in memory, and at 65 %%")
    p.add_argument("--moe", type=Path, help="measured in memory, and at 30 %%")
    p.add_argument("--kv", type=Path, help="conversations of this model are resumed from pages")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--seconds", type=float, default=6, help="of a turn on the quiet machine")
    p.add_argument("--most", type=int, default=480, help="tokens of a turn")
    p.add_argument("--no-quota", action="store_true")
    p.add_argument("--no-recovery", action="store_true")
    args = p.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])

    given = [("dense", args.dense, 65), ("MoE", args.moe, 30)]
    found = [weights for kind, model, percent in given if model for weights in kinds(kind, model, percent)]
    found += [idle_conversations(args.kv)] if args.kv else []
    engines = [engine for weights in found for engine in weights.all()]
    conditions = [QUIET, *OTHERS, *([] if args.no_quota else QUOTAS)]
    with Journal() as journal, contextlib.ExitStack() as stack:
        inside = None if args.no_quota else stack.enter_context(group(journal, None, "cpu"))
        measure(engines, conditions, inside, args)
    print_table(found, conditions)
    for engine in engines:
        if engine.adapts and not args.no_recovery:
            print(recovery(engine, args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
