"""Pages and parts of them: the templates, and what a notebook shows of a model, an engine, a plan.

A notebook has its own ground, light or dark, and may take away style sheets: the parts carry their colours, and have
that of the text around them for the rest.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .amounts import memory, number
from .drawing import BLUE, CYAN, MAUVE, NAVY, ORANGE, PINK, TEAL, TIER_COLOURS, TIER_WORDS, bar, large_tags
from .heat import heat_map

if TYPE_CHECKING:
    import jinja2

FOLDER = Path(__file__).with_name("templates")
PATIENCE_S = 1.0  # that a notebook waits for what another thread changes

# what a plan's budget is for, with the fields of a row
_CLASSES = (
    ("fixed", "fixed_bytes", NAVY),
    ("pinned", "pinned_bytes", BLUE),
    ("ring", "ring_bytes", CYAN),
    ("experts", "expert_pool_bytes", TEAL),
    ("KV", "kv_bytes", PINK),
    ("compute", "compute_bytes", ORANGE),
    ("projector", "projector_bytes", MAUVE),
)


@functools.cache
def templates() -> jinja2.Environment:
    """All that pages are made from; every value is escaped."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


# ---------------------------------------------------------------- a model, an engine


def shown(title: str, look: Callable[[], Mapping[str, Any]]) -> str:
    """A notebook's view of what may be closed, busy, or another process's: never an error, and no long wait.

    `look` returns the arguments of status(); another thread makes the call, and is left alone where it waits for a
    budget that is being changed, or for memory that is being given back.
    """
    found: list[str] = []

    def work() -> None:
        try:
            found.append(status(title, **look()))
        except Exception as e:  # whatever it is, the rest of the notebook's output is shown
            found.append(_page("status.html", title=title, note=str(e) or type(e).__name__))

    thread = threading.Thread(target=work, daemon=True, name="superllama")
    with contextlib.suppress(RuntimeError):  # the system gives no more threads
        thread.start()
        thread.join(PATIENCE_S)
    return found[0] if found else _page("status.html", title=title, note="busy: its memory is being moved")


def status(
    title: str,
    *,
    tags: Mapping[str, int],
    layers: Sequence[Mapping[str, Any]],
    budget: int,
    facts: Sequence[str] = (),
    experts: Mapping[str, Any] | None = None,
) -> str:
    """Memory by what it is for, a row of layers, with the fields of Layer, and a map of experts, as heat_map() takes
    them. `budget` is 0 where it is automatic."""
    used = sum(tags.values())
    if not layers and not used:
        return _page(
            "status.html", title=title, note=", ".join([*facts, "no dynamic layers: its memory is the kernel's"])
        )
    parts = bar(((tag, n, colour, memory(n)) for tag, n, colour in large_tags(tags)), whole=budget)
    said = f"{memory(used)} of {memory(budget)}" if budget else f"{memory(used)}, budget auto"
    return _page("status.html", title=title, note=", ".join(facts), said=said, parts=parts, cells=cells(layers),
                 tiers=tiers(layers), heat=heat_map(experts))  # fmt: skip


def cells(layers: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row of layers: for each its place, how much of it is in memory (percent), and what it says when pointed at."""
    found = []
    for i, layer in enumerate(layers):
        n_bytes, resident = layer["bytes"], layer["bytes_resident"]
        where = {"host": "in memory", "device": f"on {layer['device']}"}.get(
            layer["tier"], f"{memory(resident)} of it in memory, the rest is read when needed"
        )
        found.append(
            {
                "left": 100 * i / len(layers),
                "width": 100 / len(layers),
                "filled": 100 * (resident / n_bytes if layer["tier"] == "disk" and n_bytes else 1),
                "colour": TIER_COLOURS["host" if layer["tier"] == "disk" else layer["tier"]],
                "text": f"layer {layer['index']}: {memory(n_bytes)}, {where}",
            }
        )
    return found


def tiers(layers: Sequence[Mapping[str, Any]]) -> list[tuple[str, int, str]]:
    """How many layers are where, as (words, number, colour)."""
    counts = {tier: sum(layer["tier"] == tier for layer in layers) for tier in TIER_WORDS}
    return [(TIER_WORDS[tier], n, TIER_COLOURS[tier]) for tier, n in counts.items() if n]


# ---------------------------------------------------------------- a plan


def plan_view(plan: Mapping[str, Any]) -> str:
    """A notebook's view of Plan.as_dict(): budgets, what they would be for, and the speed that they give."""
    rows = [_plan_row(row, plan["mem_full_bytes"]) for row in (plan["asked"], *plan["table"])]
    machine, repack = plan["machine"], plan["repack"]
    experts = f", {plan['n_experts_used']} of {plan['n_experts']} experts per token" if plan["n_experts"] else ""
    faster = {"same": "makes no difference", "repack": "is faster", "no-repack": "is slower"}[repack["faster"]]
    facts = [
        f"{plan['n_layers']} layers{experts}, {plan['n_ctx']} tokens of context",
        f"needs {memory(plan['mem_full_bytes'])} for everything, works from {memory(plan['mem_least_bytes'])}",
    ]
    notes = [
        f"Measured: disk {machine['read_bytes_per_s'] / 1e9:.2f} GB/s, CPU {machine['cpu_bytes_per_s'] / 1e9:.2f} GB/s "
        f"of {machine['cpu_type']} weights with {machine['n_threads']} threads. Speeds are expected ones, with "
        "async_prefetch.",
        f"Repacking {faster}: {repack['why']}.",
    ]
    legend = [
        (name, colour) for name, key, colour in _CLASSES if any(row[key] for row in (plan["asked"], *plan["table"]))
    ]
    return _page("plan.html", title=Path(plan["model"]).name, facts=facts, rows=rows, notes=notes, legend=legend)


def nodes_view(plan: Mapping[str, Any], seconds: Sequence[float | None]) -> str:
    """A notebook's view of NodesPlan.as_dict(): machines with their layers and bytes, and what a token takes."""
    rows = [
        {
            "name": s["name"],
            "layers": f"{s['first_layer']}-{s['last_layer']}" if s["n_layers"] else "none",
            "budget": memory(s["budget_bytes"]),
            "weights": memory(s["weight_bytes"]),
            "reads": memory(s["streamed_bytes"]) if s["streamed_bytes"] else "",
            "network": memory(s["sent_bytes"] + s["received_bytes"]) if s["name"] != "head" else "",
            "ms": "" if of_token is None else number(1e3 * of_token),
        }
        for s, of_token in zip(plan["shares"], seconds, strict=True)
    ]
    speed = plan["tokens_per_s"]
    facts = [
        f"{plan['n_layers']} layers with the output, {plan['n_ctx']} tokens of context",
        f"{number(speed)} tokens/s, no placement gives more than {number(plan['bound_tokens_per_s'])}"
        if speed
        else f"too little memory on the head: works from {memory(plan['head_least_bytes'])}",
    ]
    return _page("plan_nodes.html", title=Path(plan["model"]).name, facts=facts, rows=rows)


def _plan_row(row: Mapping[str, Any], full: int) -> dict[str, Any]:
    parts = [
        (name, min(row[key], full) if row["works"] else 0, colour, memory(row[key])) for name, key, colour in _CLASSES
    ]
    speed = row["tokens_per_s"]
    return {
        "label": row["label"],
        "budget": memory(row["mem_budget_bytes"]),
        "parts": bar(parts, whole=full),
        "reads": memory(row["read_bytes_per_token"]) if speed else "",
        "speed": number(speed) if speed else "",
        "limit": row["limit"] or "too little",
    }


def _page(template: str, **values: Any) -> str:
    return templates().get_template(template).render(**values)
