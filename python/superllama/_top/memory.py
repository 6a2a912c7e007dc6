"""What `superllama top` shows of memory: what it is for, where the layers are, experts, KV pages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, zip_longest
from typing import Any

from rich.text import Text

from .._look.amounts import memory, share
from .._look.marks import COMPUTES, FULL, LABEL, MOVES, READS, bar, row
from .._look.status import MARKS, by_tier, largest
from .rates import Change

TIERS = {"host": COMPUTES, "device": MOVES, "disk": READS}
SHADES = MARKS["disk"] + "▒▓"  # of a layer on disk: how much of it stays in memory
TAGS = {"pinned": "green", "ring": "yellow", "experts": "cyan", "kv": "magenta"} | dict.fromkeys(
    ("compute", "cpu_work", "outputs"), "red"
)  # as in `superllama plan`
FIXED = "blue"


def memory_rows(found: Mapping[str, Any], width: int) -> Iterator[Text]:
    """What of the budgets is used, and what for."""
    metrics = found["metrics"]
    tags, budget = metrics["memory_by_tag"], metrics["mem_budget_bytes"]
    if not budget:
        yield row("memory", f"{metrics['ram_used_mb']:,.0f} MB; no dynamic layers: the kernel decides what stays")
        return
    large = largest(tags)
    yield _budget("memory", [(n, FULL, TAGS.get(tag, FIXED)) for tag, n in large], sum(tags.values()), budget, width)
    yield from _in_two_columns([_tag(tag, n, large[0][1], (width - LABEL) // 2) for tag, n in large])
    if most := metrics["vram_budget_bytes"]:
        own = metrics["vram_own_bytes"]
        yield _budget("devices", [(own, FULL, MOVES)], own, most, width)


def pool_rows(pool: Mapping[str, Any], width: int) -> Iterator[Text]:
    """What a router's models share; and of each, what it has of what it could use."""
    members = pool["members"]
    if not members:
        yield row("memory", "no model is loaded: each is when it is asked for")
        return
    yield _budget("memory", [(pool["leased_bytes"], FULL, COMPUTES)], pool["leased_bytes"], pool["total_bytes"], width)
    yield Text()
    label = min(width // 3, max(LABEL, *(len(m["model"]) + 1 for m in members)))
    for m in members:
        has, full = m["lease_bytes"], m["full_bytes"]
        said = f"  {memory(has)} of {memory(full)}, works from {memory(m['least_bytes'])}"
        name = m["model"][: label - 1].ljust(label)
        yield Text.assemble(name, bar([(has, FULL, COMPUTES)], full, width - label - len(said)), said)


def _budget(label: str, parts: list[tuple[float, str, str]], used: int, budget: int, width: int) -> Text:
    said = f"  {memory(used)} of {memory(budget)}"
    return row(label, bar(parts, budget, width - LABEL - len(said)), (said, "bold" if used <= budget else "bold red"))


def _tag(tag: str, n_bytes: int, most: int, width: int) -> Text:
    text = Text(f"{tag:<13}{memory(n_bytes):>8} ").append(
        "█" * round((width - 24) * n_bytes / most), TAGS.get(tag, FIXED)
    )
    return text.append(" " * (width - text.cell_len))


def _in_two_columns(cells: Sequence[Text]) -> Iterator[Text]:
    for pair in zip_longest(cells[::2], cells[1::2], fillvalue=Text()):
        yield row("", *pair)


def layer_rows(found: Mapping[str, Any], width: int) -> Iterator[Text]:
    """One character a layer, in rows that begin with the number of their first; and how many are where."""
    layers = found.get("layers") or ()
    n = max(10, (width - LABEL) // 10 * 10)
    for first in range(0, len(layers), n):
        alike = groupby(layers[first : first + n], lambda layer: layer["tier"])
        marks = (("".join(map(_mark, group)), TIERS[tier]) for tier, group in alike)
        yield row(f"{'' if first else 'layers':<6}{first:>3}", *marks)
    counts, said = by_tier(found), Text()
    missing = sum(layer["bytes"] - layer["bytes_resident"] for layer in layers if layer["tier"] == "disk")
    for tier, mark, where in (
        ("host", MARKS["host"], "in memory" if found["metrics"]["mem_budget_bytes"] else "on the host"),
        ("device", MARKS["device"], "on devices"),
        ("disk", SHADES, "stream from disk" + (f": {memory(missing)}" if missing else "")),
    ):
        if counts[tier]:
            said.append(f"{mark} {counts[tier]} {where}  ", TIERS[tier])
    if said:
        yield row("" if layers else "layers", said)


def _mark(layer: Mapping[str, Any]) -> str:
    if layer["tier"] != "disk":
        return MARKS[layer["tier"]]
    return SHADES[min(2, 3 * layer["bytes_resident"] // max(1, layer["bytes"]))]


def expert_rows(rates: Change | None, metrics: Mapping[str, Any]) -> Iterator[Text]:
    """How many experts were in memory when a router chose them, where there are any."""
    if asked := metrics["expert_hits"] + metrics["expert_misses"]:
        now = rates.expert_hits if rates else None
        said = f"{'-' if now is None else share(now)} in memory when asked for, "
        said += f"{share(metrics['expert_hits'] / asked)} since the start"
        if metrics["expert_guesses"]:
            said += f"; {share(metrics['expert_guesses_used'] / metrics['expert_guesses'])} of guesses used"
        if on_device := metrics["expert_device_hits"] + metrics["expert_device_misses"]:
            said += f"; {share(metrics['expert_device_hits'] / on_device)} on the device"
        yield row("experts", said)


def kv_page_rows(metrics: Mapping[str, Any]) -> Iterator[Text]:
    """Where the pages of a paged cache are, if it is one."""
    pages = {"on devices": "kv_pages_gpu", "in memory": "kv_pages_cpu", "on disk": "kv_pages_disk"}
    counts = {where: metrics[name] for where, name in pages.items() if metrics[name]}
    if counts:
        said = ", ".join(f"{n:,} {where}" for where, n in counts.items())
        moved = f"; {metrics['kv_pages_evicted']:,} evicted so far, {metrics['kv_pages_prefetched']:,} read ahead"
        yield row("KV pages", said + moved)
