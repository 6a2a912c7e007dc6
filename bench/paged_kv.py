#!/usr/bin/env python3
"""The paged KV cache against stock: memory, idle conversations, speed with nothing evicted, a sequence over the budget.

bench/paged_kv.py MODEL.gguf [--runs 'memory-*' 'resume-*' decode 'oversized-*'] [--out FOLDER]

Every run leaves FOLDER/NAME.json, and what is there is not run again; then FOLDER/table.md and plot.png show what is
there. Conversations run in a memory cgroup of their own where one can be made; the paged ones with a limit.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import cgroup, paged_kv_report, programs
from bench.engine import parse_output
from bench.job import HEADROOM
from bench.off_is_stock import Program, interval, take_turns
from bench.pressure import pressure
from bench.undo import Journal

PREFETCH = ["--async-prefetch"]


def run(command: list[str | Path | int], limit: int | None = None) -> dict:
    """The program's JSON, with the peak of its cgroup. Raises: RuntimeError with what it said."""
    method = "cgroup" if cgroup.find_root() else "none"
    with Journal() as journal, pressure(journal, limit, method) as p:
        child = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=p.enter
        )
        with journal.process(child):
            printed, errors = child.communicate()
        result = parse_output(printed)
        if child.returncode or result is None:
            raise RuntimeError(f"{Path(str(command[0])).name} ended with {child.returncode}: {errors.strip()[-500:]}")
        return result | {"peak_bytes": p.peak(), "limit_bytes": p.limit}


# ------------------------------------------------------------------------------------------- what is measured


def paging(a: argparse.Namespace, flags: tuple[str | int, ...]) -> list[str | int]:
    return ["--kv-page-size", a.page_size] if "--paged-kv" in flags else []


def conversations(a: argparse.Namespace, name: str, *flags: str | int, limit: int | None = None) -> dict:
    found = programs.find(name, a.build)
    return run([found, *flags, *paging(a, flags), "-m", a.model, "-t", a.threads], limit)


def memory(a: argparse.Namespace, name: str, *flags: str) -> dict:
    """One conversation that grows in a large context."""
    return conversations(a, name, *flags, "-n", 1, "--tokens", a.memory_tokens, "-c", a.memory_context, "--answer", 1)


def page(a: argparse.Namespace) -> dict:
    return conversations(a, "conversations", "--paged-kv", "-n", 1, "--tokens", 1, "-c", 256, "--answer", 1)


def kv_bytes(a: argparse.Namespace, tokens: int) -> int:
    """Of whole pages."""
    seen = page(a)
    return -(-tokens // seen["page_size"]) * seen["page_bytes"]


def resume(a: argparse.Namespace, name: str, *flags: str) -> dict:
    """Conversations that are filled one after the other, and then resumed in the same order."""
    sizes = ["-n", a.conversations, "--tokens", a.tokens, "-c", -(-(a.tokens + 32) // 256) * 256]
    if "--paged-kv" not in flags:
        return conversations(a, name, *flags, *sizes)
    budget = a.resident * kv_bytes(a, a.tokens + 16)
    limit = page(a)["rss_before"] + budget + HEADROOM
    return conversations(a, name, *flags, "--kv-budget", budget, *sizes, limit=limit)


def decode(a: argparse.Namespace) -> dict:
    """Turns of two programs that stay loaded: pages for all, and the standard cache."""
    turn = argparse.Namespace(model=a.model, prompt=a.turn_prompt, tokens=a.turn_tokens, threads=a.threads, repack=1)
    plain, paged = (Program("probe", turn, flags) for flags in ("-fa 1", "-fa 1 --paged-kv"))
    same = take_turns(plain, paged, a.turns)
    out: dict = {"turns": a.turns, "n_prompt": a.turn_prompt, "n_tokens": a.turn_tokens, "identical": same}
    for what in ("prompt", "decode"):
        pairs = [(p[what], q[what]) for p, q in zip(plain.seen, paged.seen, strict=True)]
        out[what] = {"off": [p for p, _ in pairs], "on": [q for _, q in pairs]}
        out[what]["ratio_95"] = interval([q / p for p, q in pairs])
    return out


def oversized(a: argparse.Namespace, percent: int | None, *flags: str) -> dict:
    """One sequence, whose cache is larger than the budget. None = the standard cache."""
    budget = None if percent is None else kv_bytes(a, a.tokens + 32) * percent // 100
    if budget is not None:
        flags = ("--paged-kv", "--kv-budget", str(budget), *flags)
    command = [programs.find("probe", a.build), *flags, *paging(a, flags), "-m", a.model, "-t", a.threads, "-n", 24]
    result = run([*command, "-fa", 1, "--n-prompt", a.tokens, "-c", -(-(a.tokens + 32) // 256) * 256])
    return result | {"percent": percent, "budget_bytes": budget, "async": "--async-prefetch" in flags}


RUNS: dict[str, Callable[[argparse.Namespace], dict]] = {
    "memory-stock": lambda a: memory(a, "conversations-stock"),
    "memory-paged": lambda a: memory(a, "conversations", "--paged-kv"),
    "resume-in-memory": lambda a: resume(a, "conversations-stock"),
    "resume-host-cache": lambda a: resume(a, "conversations-stock", "--host-cache", "1"),
    "resume-paged": lambda a: resume(a, "conversations", "--paged-kv"),
    "resume-paged-async": lambda a: resume(a, "conversations", "--paged-kv", *PREFETCH),
    "decode": decode,
    "oversized-stock": lambda a: oversized(a, None),
    "oversized-110": lambda a: oversized(a, 110, *PREFETCH),
    "oversized-75": lambda a: oversized(a, 75, *PREFETCH),
    "oversized-50": lambda a: oversized(a, 50, *PREFETCH),
    "oversized-25": lambda a: oversized(a, 25, *PREFETCH),
    "oversized-20": lambda a: oversized(a, 20, *PREFETCH),
    "oversized-20-sync": lambda a: oversized(a, 20),
}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("model", type=Path)
    p.add_argument("--runs", nargs="+", default=["*"], help=f"patterns: {', '.join(RUNS)}")
    p.add_argument("--conversations", type=int, default=16)
    p.add_argument("--tokens", type=int, default=4000, help="of a conversation, and of the sequence over the budget")
    p.add_argument("--resident", type=int, default=3, help="conversations that the budget holds")
    p.add_argument("--page-size", type=int, default=256, help="cells of a KV page")
    p.add_argument("--memory-context", type=int, default=131072)
    p.add_argument("--memory-tokens", type=int, default=8192)
    p.add_argument("--turns", type=int, default=90, help="of each program, for the speed of decoding")
    p.add_argument("--turn-prompt", type=int, default=256)
    p.add_argument("--turn-tokens", type=int, default=64)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path, default=Path("results-paged-kv"))
    p.add_argument("--build", type=Path)
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    a = parse(argv)
    a.out.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in RUNS if any(fnmatch.fnmatch(name, pattern) for pattern in a.runs)]
    try:
        if not wanted:
            raise ValueError(f"--runs {' '.join(a.runs)} names none of {', '.join(RUNS)}")
        if not a.model.is_file():
            raise FileNotFoundError(f"model {a.model} does not exist")
        for name in wanted:
            path = a.out / f"{name}.json"
            if not path.is_file():
                print(name, file=sys.stderr)
                path.write_text(json.dumps(RUNS[name](a)) + "\n")
        print(paged_kv_report.write(a.out))
    except (ValueError, FileNotFoundError, RuntimeError) as error:
        print(f"paged_kv: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
