#!/usr/bin/env python3
"""Print which experts a MoE model really chooses, measured in the running model (native/routing.cpp).

    bench/moe_routing.py moe.gguf --tokens 200 [--trace routing.parquet]

--trace writes the experts' bytes in the order of their use: what a cache would be asked for, for simulate.py.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import programs
from bench.trace import table, tensors


@dataclass(frozen=True)
class Routing:
    n_tokens: int
    n_layer: int
    n_expert: int
    n_expert_used: int
    entropy_bits: float  # of the expert choice within a layer, mean over layers
    entropy_max_bits: float  # log2 of the number of experts
    touched_64: float  # share of a layer's experts that 64 consecutive tokens use, mean
    neighbour_jaccard: float  # of the expert sets of two neighbouring tokens, mean
    top20_share: float  # of the routings, taken by the most used fifth of a layer's experts
    lru_hit: dict[str, float]  # share of the experts that one LRU pool holds -> hit rate


def measure(model: Path, n_tokens: int, threads: int, prompt: str, build: Path | None = None) -> np.ndarray:
    """Expert ids, (n_tokens, n_layer, n_expert_used)."""
    command = [str(programs.find("routing", build)), str(model), str(n_tokens), str(threads), prompt]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:2])} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    if not lines:
        raise RuntimeError(f"{model} has no MoE layer: no ffn_moe_topk node was seen; give a MoE model")
    layers = sorted({int(line[1]) for line in lines})
    ids = np.full((n_tokens, len(layers), len(lines[0][2].split(","))), -1, np.int32)
    for token, layer, chosen in lines:
        ids[int(token), layers.index(int(layer))] = np.array(chosen.split(","), np.int32)
    return ids


def lru_hit_rate(ids: np.ndarray, n_expert: int, share: float) -> float:
    """One LRU pool over (layer, expert), warm after the first quarter."""
    n_tokens, n_layer, _ = ids.shape
    capacity = max(1, round(share * n_layer * n_expert))
    pool: dict[tuple[int, int], None] = {}
    hits = asked = 0
    for token in range(n_tokens):
        for layer in range(n_layer):
            for expert in ids[token, layer]:
                key = (layer, int(expert))
                hit = key in pool
                if hit:
                    del pool[key]
                elif len(pool) >= capacity:
                    del pool[next(iter(pool))]
                pool[key] = None
                if token >= n_tokens // 4:
                    hits, asked = hits + hit, asked + 1
    return hits / max(1, asked)


def describe(ids: np.ndarray, n_expert: int) -> Routing:
    n_tokens, n_layer, used = ids.shape
    chosen = np.zeros((n_tokens, n_layer, n_expert), bool)
    np.put_along_axis(chosen, ids, True, 2)
    share = chosen.sum(0) / (n_tokens * used)  # (n_layer, n_expert)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nansum(share * np.log2(share), axis=1).mean()
    both = (chosen[1:] & chosen[:-1]).sum(2)
    top = np.sort(share, axis=1)[:, ::-1][:, : max(1, round(n_expert / 5))].sum(1).mean()
    windows = range(0, max(1, n_tokens - 63), 16)
    touched = float(np.mean([chosen[i : i + 64].any(0).mean() for i in windows]))
    hits = {f"{s:.3g} %": lru_hit_rate(ids, n_expert, s / 100) for s in (12.5, 25, 50, 75)}
    return Routing(n_tokens, n_layer, n_expert, used, float(entropy), float(np.log2(n_expert)), touched,
                   float((both / (2 * used - both)).mean()), float(top), hits)  # fmt: skip


def reference_trace(ids: np.ndarray, model: Path):
    """The experts' slices in the order of use; t_us counts tokens, as there is no clock in it."""
    where = tensors.read_map(model)
    rows = []
    for token in range(len(ids)):
        for layer in range(ids.shape[1]):
            for expert in ids[token, layer]:
                rows += [(token, *r, layer, int(expert)) for r in where.expert_ranges(layer, int(expert))]
    t, offset, size, layer, expert = (np.array(c) for c in zip(*rows, strict=True))
    return table.make(t, offset, size, model.name, layer=layer, expert=expert)


def markdown(r: Routing) -> str:
    lines = [
        "| measured over " + f"{r.n_tokens} tokens, {r.n_layer} layers, {r.n_expert_used} of {r.n_expert} experts | |",
        "|---|---|",
        f"| entropy of the expert choice | {r.entropy_bits:.2f} of {r.entropy_max_bits:.2f} bits |",
        f"| experts of a layer that 64 tokens touch | {r.touched_64:.0%} |",
        f"| Jaccard overlap of neighbouring tokens | {r.neighbour_jaccard:.2f} |",
        f"| routings that go to the top 20 % of experts | {r.top20_share:.0%} |",
    ]
    lines += [f"| LRU hit rate with {share} of the experts held | {hit:.0%} |" for share, hit in r.lru_hit.items()]
    return "\n".join(lines)


def expert_count(model: Path) -> int:
    return int(tensors.read_map(model).experts.max()) + 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", default="Once upon a time there was a model that did not fit into memory.")
    parser.add_argument("--trace", type=Path, help="write the order of use as Parquet, for simulate.py")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--build", type=Path)
    a = parser.parse_args()
    try:
        ids = measure(a.model, a.tokens, a.threads, a.prompt, a.build)
    except (RuntimeError, FileNotFoundError) as error:
        print(f"moe_routing: {error}", file=sys.stderr)
        return 1
    result = describe(ids, expert_count(a.model))
    print(json.dumps(asdict(result)) if a.json else markdown(result))
    if a.trace:
        table.save(reference_trace(ids, a.model), a.trace)
    return 0


if __name__ == "__main__":
    sys.exit(main())
