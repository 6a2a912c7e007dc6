#!/usr/bin/env python3
"""What the experts of a token take where a card holds some of them, by the way to it: computed, from routing that is
measured in the running model (native/routing.cpp).

    bench/moe_misses.py moe.gguf [--tokens 700] [--held 25 50] [--links 0.1 0.3 0.5 1 2]

The unit is the time in which the processor computes one expert; a link of 0.3 sends three experts in the time of ten.
*layers*: as many layers as fit have all of their experts on the card, the processor computes the others. *send*: a bank
for each layer, what it lacks is sent (`--expert-misses send`). *share*: the processor computes some of these meanwhile
(`share`). What the card computes, and how long a layer stops for its misses, are left out.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import moe_routing


class Bank:
    """As src/devices/expert_bank.cpp: the one used longest ago leaves; the link takes its share of what is missing."""

    def __init__(self, n_slots: int, link: float) -> None:
        self.n_slots, self.link = n_slots, link
        self.last_use: dict[int, int] = {}  # of the experts that it holds
        self.asked: dict[int, int] = {}
        self.owed = 0.0

    def n_sent(self, n_missing: int) -> int:
        if self.link == math.inf:
            return n_missing
        best = min(range(n_missing + 1), key=lambda n: (max(n / self.link, n_missing - n), -n))
        self.owed += n_missing * self.link / (1 + self.link)
        n = max(best, min(n_missing, int(self.owed)))
        self.owed = max(0.0, self.owed - n)
        return n

    def use(self, chosen: list[int], now: int) -> tuple[int, int]:
        """How many were sent, and how many the processor computes."""
        missing = [e for e in chosen if e not in self.last_use]
        self.last_use.update({e: now for e in chosen if e in self.last_use})
        n_sent = self.n_sent(len(missing))
        by_age = sorted(missing, key=lambda e: self.asked.get(e, -1))
        for expert in by_age[len(missing) - n_sent :]:
            if len(self.last_use) >= self.n_slots:
                del self.last_use[min(self.last_use, key=lambda e: self.last_use[e])]
            self.last_use[expert] = now
        self.asked.update(dict.fromkeys(chosen, now))
        return n_sent, len(missing) - n_sent


def time_of(ids: np.ndarray, n_expert: int, held: float, link: float, shares: bool) -> tuple[float, float]:
    """Of a token, and the share of its experts that were there; warm after a quarter of the tokens."""
    n_tokens, n_layer, n_used = ids.shape
    time, n_missing = 0.0, 0
    for layer in range(n_layer):
        bank = Bank(round(held * n_expert), link if shares else math.inf)
        for token in range(n_tokens):
            sent, computed = bank.use(ids[token, layer].tolist(), token)
            if token >= n_tokens // 4:
                time += max(sent / link, computed)
                n_missing += sent + computed
    n_counted = n_tokens - n_tokens // 4
    return time / n_counted, 1 - n_missing / (n_counted * n_layer * n_used)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, default=700)
    parser.add_argument("--held", type=float, nargs="+", default=[25, 50], help="of the experts, percent")
    parser.add_argument("--links", type=float, nargs="+", default=[0.1, 0.3, 0.5, 1, 2], help="of the memory's speed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--build", type=Path)
    a = parser.parse_args()
    try:
        ids = moe_routing.measure(a.model, a.tokens, a.threads, a.prompt, a.build)
        n_expert = moe_routing.expert_count(a.model)
    except (RuntimeError, FileNotFoundError) as error:
        print(f"moe_misses: {error}", file=sys.stderr)
        return 1
    print("| held | link | layers | send (were there) | share (were there) | gain over the better one |")
    print("|---|---|---:|---|---|---:|")
    for held in (percent / 100 for percent in a.held):
        layers = (1 - held) * ids.shape[1] * ids.shape[2]
        for link in a.links:
            send, sent_there = time_of(ids, n_expert, held, link, False)
            share, shared_there = time_of(ids, n_expert, held, link, True)
            print(
                f"| {held:.0%} | {link:g} | {layers:.0f} | {send:.0f} ({sent_there:.0%}) | {share:.0f} "
                f"({shared_there:.0%}) | {min(layers, send) / share:.1f} |",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
