"""How the `superllama` command looks on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from .amounts import size

if TYPE_CHECKING:
    from .._cache import Entry


def show_report(found: Mapping[str, Any]) -> None:
    """Print what _doctor.report() found."""
    console = Console()
    _pairs(console, "versions", found["versions"].items())

    table = Table(title="devices", title_justify="left", box=None, header_style="dim")
    for column in ("name", "backend", "kind", "description", "free", "total"):
        table.add_column(column)
    for d in found["devices"]:
        memory = size(d["memory_free"]), size(d["memory_total"])
        table.add_row(d["name"], d["backend"], d["kind"], d["description"], *memory)
    console.print(table)

    m = found["memory"]
    limits = {
        "this process may use": f"{size(m['host_total'])}, {size(m['host_available'])} available",
        "machine": f"{size(m['machine_total'])}, {size(m['machine_available'])} available",
        "cgroup": f"{size(m['cgroup_limit'])}, {size(m['cgroup_used'])} used" if m["cgroup_limit"] else "no limit",
        "locked memory": size(m["locked_limit"]),
        "swap": f"{size(m['swap_total'])}, {size(m['swap_free'])} free" if m["swap_total"] else "none",
    }
    _pairs(console, "memory", limits.items())

    build = {
        "backends": ", ".join(found["backends"]) or "none: nothing can be computed",
        "CPU": f"{found['cpu']['physical_cores']} cores, {' '.join(found['cpu']['features'])}",
        **_facts(found),
        "library offers": ", ".join(name for name, there in found["supports"].items() if there),
        "cache folder": found["cache"],
    }
    if speed := found.get("read_speed"):
        n_read = f"{size(speed['bytes'])} in {speed['seconds']:.2f} s, {speed['how']}"
        build["read speed"] = f"{speed['gb_per_s']:.2f} GB/s from {speed['path']} ({n_read})"
    _pairs(console, "build and disk", build.items())


def _facts(found: Mapping[str, Any]) -> dict[str, str]:
    """What is in and what is not, and what follows from it."""
    build, amx, quota = found["build"], found["cpu"]["amx"], found["cpu"]["quota"]
    pressure = found["cpu"]["pressure"]
    if not amx["cpu"]:
        amx_text = "this CPU has none"
    else:
        amx_text = "used" if amx["build"] else "this CPU has it, this build does not use it"
    pages = found["huge_pages"]
    return {
        "CPU pressure": "not measured here" if pressure is None else f"{pressure:.0%} of the last 10 s",
        "CPU quota": f"{quota:g} CPUs' time; more threads than that wait" if quota else "no limit",
        "AMX": amx_text,
        "huge pages": "not known" if pages is None else pages + ("; reads are slower" if pages == "never" else ""),
        "HTTPS": "in" if build.get("https") else "not in: -hf and --model-url need it; build with OpenSSL's headers",
        "server's page": "in" if build.get("page") else "not in: build with Node.js and npm, or take a wheel",
        "OpenMP": "in" if build.get("openmp") else "not in: ggml's own threads compute",
        "built for": f"{'every' if build.get('portable') else 'this'} CPU, by {build.get('compiler', '?')}",
    }


def show_entries(folder: Path, entries: Sequence[Entry], what: str) -> None:
    """Print what the cache holds, or what is to be removed, or was: `what` says which ("kept", "removed", ...)."""
    console = Console()
    if not entries:
        console.print(f"{folder}: nothing {what}", soft_wrap=True)
        return
    _pairs(console, f"{what} in {folder}", ((e.name, size(e.size_bytes)) for e in entries))
    console.print(f"total {size(sum(e.size_bytes for e in entries))}")


def _pairs(console: Console, title: str, pairs: Iterable[tuple[str, str]]) -> None:
    table = Table(title=title, title_justify="left", box=None, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(name, value)
    console.print(table)
