"""One table of what a card gives: superllama and stock's best static placement at the same VRAM, and the bound.

    python -m bench.gpu --model MODEL.gguf [--shares 15 25 40 60 80 100] [--host 100 50] [--prompts 512 4096]
                        [--tokens 48] [--threads N] [--turns 3] [--quick] [--expert-misses share] [--server [THREADS]]
                        [--saturation OUT.svg]

For each budget of VRAM, and of host memory beside it, in percent of the model's file: `--dynamic-layers
--async-prefetch --vram-budget X [--mem-budget Y]`, in turns with the placement of stock (bench/placement.py) that takes
no more of the card at its peak than ours did. A turn is a process of its own (bench/gpu_turn.py), whose times leave
loading out; the order alternates. Speeds are medians of the turns, ratios medians of the pairs. Where the host's budget
is below 100, both run in a memory cgroup of that and --headroom, if one can be made. The bound is bench/bound.py's,
with the speeds of link, memory and disk as this run finds them. VRAM is what an NVIDIA driver shows in use above what
was before, its own with it; without one, what the backend shows.

--server: no card, but an RPC server on this machine with so many threads (all cores without a number), one for each
run, whose VRAM is what its process has in memory. It computes on the same processor as the host, mostly while that one
waits: with twice the threads it is a device that is up to twice as fast. Weights of the host are not repacked then, for
a server's are not.

--quick: two budgets, one prompt, one turn. --saturation: instead of the table, another program takes memory of the card
in the middle of a generation with an automatic budget, and gives it back; a plot of speed and VRAM over time
(bench/gpu_saturation.py). Markdown is on standard output, progress on standard error.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

from bench import bound, card, cgroup, disk_speed, gpu_report, gpu_saturation, machine, rpc_server
from bench.gpu_report import Row
from bench.gpu_runs import Runner, Stock, note
from bench.gpu_turn import Result
from bench.placement import ALL, Placement
from bench.sizes import format_size, parse_size
from superllama._memory import n_physical_cores

DISK_BYTES = 1 << 30  # read to measure the disk
QUICK = {"shares": [25, 60], "host": [100], "prompts": [512], "tokens": 24, "turns": 1}
FULL = {"shares": [15, 25, 40, 60, 80, 100], "host": [100, 50], "prompts": [512, 4096], "tokens": 48, "turns": 3}


def measure(stock: Stock, share: int, host: int, turns: int, misses: str = "send") -> Row:
    """A row: ours first, which says what stock may take, then whoever was last begins."""
    runner, size = stock.runner, stock.weights.file_bytes
    vram_budget, host_budget = size * share // 100, size * host // 100 if host < 100 else None
    note(f"VRAM {share} %, host {host} %")
    params: dict[str, object] = {"dynamic_layers": True, "async_prefetch": True, "vram_budget": vram_budget}
    params["expert_misses"] = misses
    spec = runner.spec(params if host_budget is None else {**params, "mem_budget": host_budget}, {})
    ours = [runner.run(spec, host_budget)]
    where = stock.best(vram_budget if ours[0].error else ours[0].vram_bytes)
    stocks = [runner.run(stock.spec(where), host_budget)]
    for i in range(1, turns):
        for ours_now in (False, True) if i % 2 else (True, False):
            result = runner.run(spec if ours_now else stock.spec(where), host_budget)
            (ours if ours_now else stocks).append(result)
    for what, results in ((f"stock, {where}", stocks), ("ours", ours)):
        note(f"  {what}: " + ", ".join(r.error or f"{r.decode:.2f} tok/s" for r in results))
    return Row(share, vram_budget, host_budget, where, stocks, ours)


def limits_of(whole: Result, here: card.Card, disk: float, n_ubatch: int) -> bound.CardLimits:
    """`whole`: a run with everything on the card, or what went wrong with it."""
    token_s = 1 / whole.decode if whole.decode else 0.0
    prompt_s = {int(n): int(n) / speed for n, speed in whole.prompt.items()}
    link = max(here.speeds.link, here.speeds.link_pageable)
    return bound.CardLimits(token_s, prompt_s, n_ubatch, here.free_bytes, here.speeds.ram, link, disk)


def about(args: argparse.Namespace, here: card.Card, limits: bound.CardLimits, whole: Result) -> str:
    """What a reader has to know of the numbers."""
    computer = machine.describe()
    device = f"RPC server with {args.server} threads" if args.server else here.description
    link = f"{here.speeds.link / 1e9:.2f} GB/s from page-locked memory, " if here.speeds.link else ""
    fits = f"{whole.decode:.1f} tok/s" if not whole.error else f"{whole.error}, so the bounds leave its time out"
    lines = [
        f"`python -m bench.gpu {' '.join(sys.argv[1:])}`",
        f"{args.model.name}, {format_size(args.model.stat().st_size)}; {device}, "
        f"{format_size(here.free_bytes)} free; {computer['cpu']}, {args.threads} threads; "
        f"link {link}{here.speeds.link_pageable / 1e9:.2f} GB/s pageable; memory {limits.ram / 1e9:.1f} GB/s; disk "
        f"{limits.disk / 1e9:.2f} GB/s; everything on the card (`-ngl 99`): {fits}.",
    ]
    if any(host < 100 for host in args.host) and cgroup.find_root() is None:
        lines.append(f"Stock has all of the host's memory in every row: {cgroup.why_not()}.")
    if here.computed:
        lines.append("Mesa computes this card on the processor: the numbers say that it works, and nothing else.")
    return "\n\n".join(lines)


def look(args: argparse.Namespace) -> card.Card:
    """Raises: RuntimeError if there is no card."""
    if args.server:
        os.environ.update(CUDA_VISIBLE_DEVICES="", GGML_VK_VISIBLE_DEVICES="")
    with rpc_server.serving(args.server) if args.server else contextlib.nullcontext() as server:
        here = card.ask(args.threads, server.endpoint if server else "")
    if here is None:
        raise RuntimeError(card.NO_CARD)
    return here


def table(args: argparse.Namespace, here: card.Card) -> None:
    weights = bound.weights_of(args.model)
    runner = Runner(
        args.model, sorted(args.prompts), args.tokens, args.threads, args.ubatch, card.nvml(), args.headroom,
        cgroup.find_root() is not None, args.server,
    )  # fmt: skip
    stock = Stock(runner, weights)
    note("everything on the card")
    whole = runner.run(stock.spec(Placement(ALL)))
    disk = disk_speed.measure(args.model, n_bytes=DISK_BYTES).bytes_per_s
    limits = limits_of(whole, here, disk, args.ubatch)
    print(f"{about(args, here, limits, whole)}\n\n{gpu_report.head(runner.prompts)}", flush=True)
    failures: list[str] = []
    for host in args.host:
        for share in args.shares:
            row = measure(stock, share, host, args.turns, args.expert_misses)
            print(gpu_report.text(row, runner.prompts, weights, limits), flush=True)
            failures += gpu_report.failures(row)
    if failures:
        print("", *failures, sep="\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shares", type=int, nargs="+", help="of the card, percent of the model's file")
    parser.add_argument("--host", type=int, nargs="+", help="of the host's memory, the same; 100: all there is")
    parser.add_argument("--prompts", type=int, nargs="+", help="tokens")
    parser.add_argument("--tokens", type=int, help="decoded")
    parser.add_argument("--turns", type=int)
    parser.add_argument("--threads", type=int, default=n_physical_cores())
    parser.add_argument("--ubatch", type=int, default=512)
    parser.add_argument("--headroom", type=parse_size, default=parse_size("1GiB"), help="beside the host's budget")
    parser.add_argument("--expert-misses", choices=["send", "share"], default="send", help="of superllama")
    parser.add_argument("--server", type=int, nargs="?", const=n_physical_cores(), default=0, metavar="THREADS")
    parser.add_argument("--quick", action="store_true", help="what is not named above is small")
    parser.add_argument("--saturation", type=Path, metavar="OUT.svg", help="or .png")
    parser.add_argument("--seconds", type=float, default=45, help="of --saturation, in three equal parts")
    args = parser.parse_args(arguments)
    for name, value in (QUICK if args.quick else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    begin = time.monotonic()
    try:
        if not args.model.is_file():
            raise RuntimeError(f"there is no file {args.model}; bench/make_model.py makes one")
        if args.server and args.saturation:
            raise RuntimeError("--saturation needs a card: a server's memory is that of this machine")
        here = look(args)
        if args.saturation:
            print(gpu_saturation.show(args, here))
        else:
            table(args, here)
    except (RuntimeError, OSError) as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 1
    note(f"{time.monotonic() - begin:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
