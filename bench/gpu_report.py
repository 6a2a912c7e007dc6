"""The table of bench/gpu.py: a row for each pair of budgets, its speeds, and what of the bound was reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from bench.bound import CardLimits, Weights
from bench.gpu_turn import OUT_OF_MEMORY, Result
from bench.placement import Placement
from bench.sizes import format_size

Value = Callable[[Result], "float | None"]


@dataclass
class Row:
    share: int  # of the card, percent of the model's file
    vram_budget: int  # the same in bytes
    host_budget: int | None  # bytes; None: all there is
    where: Placement  # of stock
    stock: list[Result]  # of each turn
    ours: list[Result]


def head(prompts: list[int]) -> str:
    cells = ["VRAM", "host", "stock's flags"]
    for what in (*(f"prompt of {n}, tok/s" for n in prompts), "decode, tok/s"):
        cells += [f"{what}: stock", "ours", "ratio"]
    cells += ["first token, s: stock", "ours", "VRAM peak, MB: stock", "ours", "link, MB/token", "experts on the card"]
    cells += [f"bound, prompt of {prompts[-1]}, tok/s", "reached", "bound, decode, tok/s", "reached"]
    return f"{line(cells)}\n{line(['---:', '---:', '---', *['---:'] * (len(cells) - 3)])}"


def line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def text(row: Row, prompts: list[int], weights: Weights, limits: CardLimits) -> str:
    cells = [f"{row.share} %, {format_size(row.vram_budget)}", host(row), f"`{row.where}`"]
    for n in prompts:
        cells += compared(row, prompt_of(n))
    cells += compared(row, lambda result: result.decode)
    cells += [number(middle(turns, lambda r: r.first_token_s), "{:.2f}") for turns in (row.stock, row.ours)]
    cells += [number(middle(turns, lambda r: r.vram_bytes / 1e6), "{:.0f}") for turns in (row.stock, row.ours)]
    cells += [number(middle(row.ours, lambda r: r.link_bytes and r.link_bytes / 1e6), "{:.1f}"), hit_rate(row.ours)]
    of_prompt, of_decode = bounds(row, prompts[-1], weights, limits)
    for best, value in ((of_prompt, prompt_of(prompts[-1])), (of_decode, lambda r: r.decode)):
        speed = middle(row.ours, value)
        cells += [number(best), number(speed / best if speed and best else None, "{:.2f}")]
    return line(cells)


def prompt_of(n: int) -> Value:
    return lambda result: result.prompt.get(str(n))


def middle(turns: list[Result], value: Value) -> float | None:
    """The median of those that ended well."""
    found = [v for r in turns if not r.error and (v := value(r)) is not None]
    return median(found) if found else None


def failures(row: Row) -> list[str]:
    """Why runs failed for another reason than memory; a cell has no room for it."""
    where = f"VRAM {row.share} %, host {host(row)}"
    found = [(f"stock, {row.where}", row.stock), ("superllama", row.ours)]
    return [f"- {who}, {where}: {e}" for who, turns in found for e in {r.error for r in turns} - {"", OUT_OF_MEMORY}]


def host(row: Row) -> str:
    return "all" if row.host_budget is None else format_size(row.host_budget)


def compared(row: Row, value: Value) -> list[str]:
    """Stock, ours, and the ratio of the pairs; in place of a speed that no turn has, why."""
    cells = []
    for turns in (row.stock, row.ours):
        speed, wrong = middle(turns, value), {r.error for r in turns} - {""}
        without = OUT_OF_MEMORY if OUT_OF_MEMORY in wrong else "failed" if wrong else "-"
        cells.append(without if speed is None else number(speed))
    pairs = [(value(a), value(b)) for a, b in zip(row.stock, row.ours, strict=True) if not (a.error or b.error)]
    ratios = [b / a for a, b in pairs if a and b]
    return [*cells, number(median(ratios) if ratios else None, "{:.2f}")]


def number(value: float | None, form: str = "") -> str:
    if value is None:
        return "-"
    return form.format(value) if form else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def hit_rate(turns: list[Result]) -> str:
    hits, misses = (middle(turns, lambda r, of=of: getattr(r, of)) or 0 for of in ("device_hits", "device_misses"))  # type: ignore[misc]
    return f"{hits / (hits + misses):.0%}" if hits + misses else "-"


def bounds(row: Row, n_prompt: int, weights: Weights, limits: CardLimits) -> tuple[float | None, float | None]:
    """Tokens/s of the prompt and of decoding; None: nothing that is known bounds them. Of experts, those that our runs
    counted as missing are missing, where they did count."""
    vram = min(row.vram_budget, limits.card_bytes)
    missing, host_bytes = weights.missing(vram), weights.host_bytes(vram)
    counted = middle(row.ours, lambda r: r.device_misses)
    if weights.moe and counted is not None:
        missing = max(0, weights.dense_bytes - vram) + counted * weights.expert_bytes
    if row.host_budget is None:
        return limits.prompt(n_prompt, host_bytes), limits.decode(weights, missing)
    from_disk = max(0, missing - row.host_budget)
    if weights.moe:
        from_disk = (middle(row.ours, lambda r: r.host_misses) or 0) * weights.expert_bytes
    prompt_from_disk = max(0, host_bytes - row.host_budget)
    return limits.prompt(n_prompt, host_bytes, prompt_from_disk), limits.decode(weights, missing, from_disk)
