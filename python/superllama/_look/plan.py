"""How `superllama plan` looks on a terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .._plan import Plan, Row
from .._plan_nodes import NodesPlan
from .amounts import size
from .marks import FULL, bar

BAR_CELLS = 24

# memory classes in the order of the bar: name, colour, character where there are no colours
CLASSES = (
    ("fixed", "blue", "F"),
    ("pinned", "green", "P"),
    ("ring", "yellow", "R"),
    ("experts", "cyan", "E"),
    ("KV", "magenta", "K"),
    ("compute", "red", "C"),
    ("projector", "bright_blue", "M"),
)


def show_plan(plan: Plan, console: Console | None = None) -> None:
    """Print a plan."""
    console = console or Console()
    experts = f", {plan.n_experts_used} of {plan.n_experts} experts per token" if plan.n_experts else ""
    console.print(
        f"{plan.model.name}: {size(plan.model_bytes)}, {plan.n_layers} layers{experts}, {plan.n_ctx} tokens of context",
        soft_wrap=True,
    )
    console.print(f"needs {size(plan.mem_full_bytes)} for everything, works from {size(plan.mem_least_bytes)}")
    m = plan.machine
    console.print(
        f"measured: disk {m.read_bytes_per_s / 1e9:.2f} GB/s ({m.read_how}), CPU {m.cpu_bytes_per_s / 1e9:.2f} GB/s of "
        f"{m.cpu_type} weights with {m.n_threads} threads",
        soft_wrap=True,
    )

    row = plan.asked
    console.print(
        f"in memory at any budget: {size(row.fixed_bytes)} of weights, {size(row.kv_bytes)} KV when all of it is "
        f"used, {size(row.compute_bytes)} compute buffers"
        + (f", {size(row.projector_bytes)} of the projector" if row.projector_bytes else ""),
        soft_wrap=True,
    )

    experts_too = plan.n_experts > 0
    table = Table(box=None, header_style="dim")
    for name in (
        "",
        "budget",
        "pinned",
        "ring",
        *(["experts"] if experts_too else []),
        "reads/token",
        "tokens/s",
        "limit",
    ):
        table.add_column(name, justify="left" if name in ("", "limit") else "right", no_wrap=True)
    for row in (plan.asked, *plan.table):
        memory = [row.pinned_bytes, row.ring_bytes, *([row.expert_pool_bytes] if experts_too else [])]
        speed = [size(row.read_bytes_per_token), f"{row.tokens_per_s:.2f}", row.limit or ""] if row.tokens_per_s else []
        table.add_row(
            row.label,
            size(row.mem_budget_bytes),
            *((size(n) if row.works else "-") for n in memory),
            *(speed or ["-", "-", "too little"]),
            style="bold" if row is plan.asked else None,
        )
    console.print(table)
    for row in (plan.asked, *plan.table):
        console.print(_bar(row, plan.mem_full_bytes, console.is_terminal))
    console.print(Text.assemble(" " * 7, *((f" {mark} {name} ", colour) for name, colour, mark in CLASSES)))

    _notes(plan, console)


def _bar(row: Row, full_bytes: int, colours: bool) -> Text:
    """The classes of memory of a budget, on the scale of what everything needs."""
    sizes = (
        row.fixed_bytes, row.pinned_bytes, row.ring_bytes, row.expert_pool_bytes, row.kv_bytes, row.compute_bytes,
        row.projector_bytes,
    )  # fmt: skip
    text = Text(f"{row.label:>6} ")
    if not row.works:
        return text.append("too little", "dim")
    parts = ((n, FULL if colours else mark, colour) for (_, colour, mark), n in zip(CLASSES, sizes, strict=True))
    return text.append_text(bar(parts, full_bytes, 2 * BAR_CELLS))


def _notes(plan: Plan, console: Console) -> None:
    if not plan.asked.works:
        least = -(-plan.mem_least_bytes >> 20) + 1
        console.print(f"{size(plan.asked.mem_budget_bytes)} are too little: the least that works is {least} MiB")
    if plan.n_experts:
        console.print("experts: reads are an upper estimate, as if a router chose every expert equally often")
    p = plan.prompt
    if p.seconds_least is not None and p.seconds_most is not None:
        passes = f"{p.n_passes} pass{'es' if p.n_passes > 1 else ''} over the weights"
        console.print(f"prompt of {p.n_tokens} tokens: {passes}, {p.seconds_least:.2g} to {p.seconds_most:.2g} s")
    if p.advice:
        console.print(p.advice, soft_wrap=True)
    r = plan.repack
    verdict = {"same": "makes no difference", "repack": "is faster", "no-repack": "is slower"}[r.faster]
    console.print(f"repacking {verdict}: {r.why}", soft_wrap=True)
    if r.file_bytes:
        console.print(f"a file of {size(r.file_bytes)} with the repacked blocks goes to the cache folder, once")
    console.print(
        "speeds are expected ones, with --async-prefetch; other programs and long contexts cost some", style="dim"
    )


def show_nodes(plan: NodesPlan, console: Console | None = None) -> None:
    """Print a plan of several machines."""
    console = console or Console()
    console.print(
        f"{plan.model.name}: {size(plan.model_bytes)}, {plan.n_layers} layers with the output, {plan.n_ctx} tokens of "
        "context",
        soft_wrap=True,
    )
    table = Table(box=None, header_style="dim", padding=(0, 1, 0, 0))  # fits into 80 columns
    for name in ("", "layers", "budget", "weights", "KV, buffers", "reads", "network", "waits", "ms/token"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for s in plan.shares:
        table.add_row(
            s.name,
            f"{s.first_layer}-{s.last_layer}" if s.n_layers else "none",
            size(s.budget_bytes),
            size(s.weight_bytes),
            size(s.kv_bytes + s.compute_bytes),
            size(s.streamed_bytes) if s.streamed_bytes else "",
            size(s.sent_bytes + s.received_bytes) if s.name != "head" else "",
            str(s.n_round_trips) if s.name != "head" else "",
            f"{1e3 * s.seconds:.2f}" if s.seconds is not None else "",
        )
    console.print(table)
    if plan.seconds_per_token is None:
        least = -(-plan.head_least_bytes >> 20) + 1
        console.print(
            f"the head's {size(plan.shares[0].budget_bytes)} are too little: with these layers the least that works is "
            f"{least} MiB",
            soft_wrap=True,
        )
    else:
        compute, disk, network = (
            sum(getattr(s, f"seconds_{part}") for s in plan.shares) for part in ("compute", "disk", "network")
        )
        console.print(
            f"a token: {1e3 * plan.seconds_per_token:.2f} ms, {plan.tokens_per_s:.2f} tokens/s (compute "
            f"{1e3 * compute:.2f} ms, disk {1e3 * disk:.2f} ms meanwhile, network {1e3 * network:.2f} ms); no "
            f"placement gives more than {plan.bound_tokens_per_s:.2f}",
            soft_wrap=True,
        )
    for s in plan.shares[1:]:
        if s.n_layers:
            console.print(
                f"first load of {s.name}: {size(s.load_bytes)} cross the network, {size(s.load_model_dir_bytes)} with "
                f"--model-dir; {s.load_seconds:.1f} s as planned",
                soft_wrap=True,
            )
    for m in plan.more:
        speed = "does not work" if m.tokens_per_s is None else f"{m.tokens_per_s:.2f} tokens/s"
        factor = f" ({m.faster:.2f}x)" if m.faster is not None else ""
        console.print(f"1 GiB more on {m.name}: {m.n_layers} layers on nodes, {speed}{factor}", soft_wrap=True)
    if plan.machine is not None:
        console.print(
            f"measured here, for what the file does not say: disk {plan.machine.read_bytes_per_s / 1e9:.2f} GB/s, CPU "
            f"{plan.machine.cpu_bytes_per_s / 1e9:.2f} GB/s of weights, also of nodes without `compute`",
            soft_wrap=True,
        )
