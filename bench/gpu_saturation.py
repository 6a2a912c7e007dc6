"""Another program takes memory of the card in the middle of a generation, and gives it back: a part of bench/gpu.py.

The budget is automatic. The other program takes half of what is free then; on a card so large that nothing would have
to leave, so much that half of the model must. Three equal parts of time: alone, beside it, alone again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from statistics import median

from bench import card
from bench.gpu_runs import Runner, note, result_of, start
from bench.sizes import format_size

BIN_S = 0.5  # a speed is of so much time
LOAD_S = 300  # until the first token
HIGH_MARK = 0.85  # of a card's memory: above it layers leave (--mem-pressure's default)

Point = tuple[float, int]  # monotonic time of a token, bytes of the model on devices


@dataclass
class Generation:
    points: list[Point]
    taken: float  # when, as in the points
    returned: float
    taken_bytes: int


def to_take(total: int, free: int, own: int) -> int:
    """Bytes, of a card that has so many free beside what the model has there."""
    return min(total, max(free // 2, int(HIGH_MARK * total) - own // 2))


def speeds(points: list[Point], bin_s: float = BIN_S) -> list[tuple[float, float]]:
    """(time, tokens/s), of at least so many seconds each."""
    out, last = [], 0
    for i in range(1, len(points)):
        seconds = points[i][0] - points[last][0]
        if seconds >= bin_s:
            out.append(((points[i][0] + points[last][0]) / 2, (i - last) / seconds))
            last = i
    return out


def judge(run: Generation) -> str:
    """A table: the medians of speed and memory in each part."""
    rows = ["| the other program | speed, tok/s | of the model on the card, MB |", "|---|---:|---:|"]
    parts = (("has nothing yet", 0, run.taken), ("has its part", run.taken, run.returned),
             ("has given it back", run.returned, float("inf")))  # fmt: skip
    for name, begin, end in parts:
        here = [point for point in run.points if begin <= point[0] < end]
        speed = (len(here) - 1) / (here[-1][0] - here[0][0]) if len(here) > 1 else 0.0
        rows.append(f"| {name} | {speed:.2f} | {median(b for _, b in here) / 1e6 if here else 0:.0f} |")
    return "\n".join(rows)


def generate(args: argparse.Namespace, here: card.Card) -> Generation:
    runner = Runner(args.model, sorted(args.prompts)[:1], args.tokens, args.threads, args.ubatch, None, 0, False)
    params = {"dynamic_layers": True, "async_prefetch": True, "vram_budget": "auto"}
    spec = replace(runner.spec(params, {}), seconds=args.seconds, watch=False)
    with contextlib.closing(card.OtherProgram(here.computed)) as other, start(spec, other.environment) as child:
        points: list[Point] = []
        heard = threading.Event()

        def listen(lines: Iterable[str]) -> None:
            for line in lines:
                if line.startswith("["):
                    points.append(tuple(json.loads(line)))
                    heard.set()
            heard.set()  # it has ended, whatever it said

        errors: list[str] = []
        assert child.stdout and child.stderr
        listeners = [
            threading.Thread(target=listen, args=(child.stdout,)),
            threading.Thread(target=errors.extend, args=(child.stderr,)),
        ]
        for listener in listeners:
            listener.start()
        if not heard.wait(LOAD_S) or not points:
            child.kill()
            raise RuntimeError(f"the generation did not begin: {result_of('', ''.join(errors), child.wait()).error}")
        time.sleep(args.seconds / 3)
        n_bytes = to_take(here.total_bytes, max(0, here.free_bytes - points[-1][1]), points[-1][1])
        note(f"the other program takes {format_size(n_bytes)}")
        taken = time.monotonic()
        other.hold(n_bytes)
        time.sleep(args.seconds / 3)
        note("the other program gives it back")
        returned = time.monotonic()
        other.hold(0)
        for listener in listeners:
            listener.join()
        if child.wait() != 0:
            note(f"the generation ended early: {result_of('', ''.join(errors), child.returncode).error}")
    return Generation(points, taken, returned, n_bytes)


def draw(run: Generation, path: str, title: str) -> None:
    from matplotlib import pyplot  # for this alone, as the next

    from bench import plots

    begin = run.points[0][0]
    figure, (fast, full) = pyplot.subplots(2, 1, figsize=(8, 5.5), sharex=True)
    for axes in (fast, full):
        axes.axvspan(run.taken - begin, run.returned - begin, color="#d9a441", alpha=0.25, lw=0)
    series = speeds(run.points)
    fast.plot([t - begin for t, _ in series], [v for _, v in series], color=plots.colour("superllama"))
    fast.set_ylabel("decode, tokens/s")
    fast.set_ylim(bottom=0)
    fast.set_title(title)
    times = [t - begin for t, _ in run.points]
    ours = [b / 1e6 for _, b in run.points]
    full.step(times, ours, where="post", color=plots.colour("superllama"), label="the model")
    edges = [0, run.taken - begin, run.returned - begin, times[-1]]
    others = [0, run.taken_bytes / 1e6, 0, 0]
    full.step(edges, others, where="post", color=plots.BOUND, ls="--", label="the other program")
    full.set_ylabel("memory of the card, MB")
    full.set_xlabel("time, s")
    full.set_ylim(bottom=0)
    full.legend(loc="upper right")
    figure.savefig(path)
    pyplot.close(figure)


def show(args: argparse.Namespace, here: card.Card) -> str:
    """Runs it and draws it; what to print."""
    run = generate(args, here)
    draw(run, str(args.saturation), f"{args.model.name} beside a program that takes {format_size(run.taken_bytes)}")
    return (
        f"{args.model.name}, {here.description}, {format_size(here.total_bytes)}: another program takes "
        f"{format_size(run.taken_bytes)} for {args.seconds / 3:.0f} s of {args.seconds:.0f} s; {args.saturation}\n\n"
        f"{judge(run)}"
    )
