"""A server's status as text: budgets, memory by what it is for, a row of layers by tier, counters. 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

MARKS = {"host": "█", "device": "▣", "disk": "░"}
_WIDTH = 64
MIB = 1 << 20


def status_text(found: Mapping[str, Any]) -> str:
    """What GET /superllama says, in lines."""
    metrics, state = found.get("metrics"), state_of(found)
    lines = [f"superllama {found['version']} (llama.cpp {found['upstream_build']}){f': {state}' * (state != 'ready')}"]
    if found.get("router"):
        return "\n".join([*lines, *_pool(found["pool"])])
    if not metrics:
        return "\n".join([*lines, "no model in memory, and nothing of it to show, until the server resumes"])
    if not found["dynamic_layers"]:
        lines.append("no dynamic layers: memory is the kernel's")
    else:
        used, budget = found["memory_used_bytes"], metrics["mem_budget_bytes"]
        lines.append(f"memory   {_mib(used)} of {_mib(budget)} {_bar(used, budget)}")
        lines += _by_tag(metrics["memory_by_tag"])
        if metrics["vram_budget_bytes"]:
            lines.append(f"devices  {_mib(metrics['vram_own_bytes'])} of {_mib(metrics['vram_budget_bytes'])}")
        lines += _layers(found)
    stall = metrics["stall_ms"] / 1e3
    rate = metrics["avg_tokens_per_sec"]
    lines.append(f"tokens   {metrics['token']}, {rate:.1f} a second while generating; waited {stall:.1f} s for reads")
    read = metrics["weight_bytes_read"]
    lines.append(f"read     {read / 1e9:.2f} GB of weights; experts {_share(metrics)}")
    return "\n".join(lines)


def _pool(pool: Mapping[str, Any]) -> Iterator[str]:
    """What a router's models share, and what each has of what it could use."""
    members = pool["members"]
    if not members:
        yield "serves several models, and none is loaded: each is when it is asked for"
        return
    leased, total = pool["leased_bytes"], pool["total_bytes"]
    width = max(8, *(len(m["model"]) for m in members))
    yield f"{'memory':<{width}} {_mib(leased)} of {_mib(total)} {_bar(leased, total)}"
    for m in members:
        has, full = m["lease_bytes"], m["full_bytes"]
        said = f"{_mib(has)} of {_mib(full)} {_bar(has, full)} works from {_mib(m['least_bytes'])}"
        yield f"{m['model']:<{width}} {said if has else 'gave its memory back'}"


def _mib(n_bytes: int) -> str:
    return f"{n_bytes / MIB:,.0f} MiB"


def state_of(found: Mapping[str, Any]) -> str:
    """What a server is doing."""
    return str(found.get("state") or "ready")  # older servers name none


def _bar(used: int, budget: int, width: int = 24) -> str:
    full = min(width, round(width * used / budget)) if budget else 0
    return "[" + "#" * full + "-" * (width - full) + "]"


def largest(tags: Mapping[str, int]) -> list[tuple[str, int]]:
    """What memory is for, the most first, as far as it has a MiB."""
    return [(tag, n) for tag, n in sorted(tags.items(), key=lambda item: -item[1]) if n >= MIB]


def _by_tag(tags: Mapping[str, int]) -> list[str]:
    parts = [f"{tag} {_mib(n)}" for tag, n in largest(tags)]
    return ["         " + ", ".join(parts[i : i + 3]) for i in range(0, len(parts), 3)]


def by_tier(found: Mapping[str, Any]) -> dict[str, int]:
    """How many layers are where; by the metrics, where a status has no list of layers."""
    if layers := found.get("layers"):
        return {tier: sum(layer["tier"] == tier for layer in layers) for tier in MARKS}
    counters = {"host": "cpu_layers_active", "device": "gpu_layers_active", "disk": "disk_layers_active"}
    return {tier: found["metrics"][counters[tier]] for tier in MARKS}


def _layers(found: Mapping[str, Any]) -> list[str]:
    """One character a layer; several lines where there are many."""
    row = "".join(MARKS[layer["tier"]] for layer in found["layers"])
    counts = by_tier(found)
    said = ", ".join(f"{mark} {counts[tier]} {tier}" for tier, mark in MARKS.items() if counts[tier])
    rows = [row[i : i + _WIDTH] for i in range(0, len(row), _WIDTH)]
    return [f"{'layers   ' if i == 0 else '         '}{part}" for i, part in enumerate(rows)] + [f"         {said}"]


def _share(metrics: Mapping[str, Any]) -> str:
    asked = metrics["expert_hits"] + metrics["expert_misses"]
    return f"{metrics['expert_hits'] / asked:.0%} in memory when asked for" if asked else "none"
