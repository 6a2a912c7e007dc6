"""Requests a second through Ray Serve, against the same server without it.

    python -m bench.cluster MODEL.gguf --mem-per-node 90MiB

On this machine: `superllama-server` with an RPC server; then groups of two nodes as replicas of Ray Serve, one and two
of them, on raylets whose memory is that of a node. Everywhere the same budgets, one thread for each node, the same
requests. Ray has to be installed (the extra `ray`).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import rpc_server
from bench.control_plane import serving
from bench.sizes import parse_size
from superllama._engine.starting import free_port

N_SLOTS = 4
STORE = 80 << 20  # the least that an object store of Ray takes


@dataclass(frozen=True)
class Result:
    tokens_per_s: float
    first_token_s: float  # median


def answer(url: str, number: int, n_tokens: int) -> tuple[float, int]:
    """Seconds to the first token, and the number of tokens, of one stream."""
    prompt = f"Question {number}. " + " ".join(f"word{number * 7 + i}" for i in range(12))
    body = {"prompt": prompt, "n_predict": n_tokens, "ignore_eos": True, "stream": True, "cache_prompt": False}
    request = urllib.request.Request(
        f"{url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    begin, first, n = time.perf_counter(), 0.0, 0
    with urllib.request.urlopen(request, timeout=600) as lines:
        for line in lines:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter() - begin
                n += len(json.loads(line[6:]).get("tokens", []))
    return first, n


def measured(url: str, n_clients: int, n_requests: int, n_tokens: int) -> Result:
    with concurrent.futures.ThreadPoolExecutor(n_clients) as clients:
        begin = time.perf_counter()
        done = list(clients.map(lambda i: answer(url, i, n_tokens), range(n_requests)))
        seconds = time.perf_counter() - begin
    return Result(sum(n for _, n in done) / seconds, statistics.median(first for first, _ in done))


def until_ready(url: str, n_groups: int) -> None:
    for _ in range(1200):
        with contextlib.suppress(OSError, ValueError), urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            groups = json.load(reply).get("groups", [])
            if [g.get("state") for g in groups] == ["ready"] * n_groups:
                return
        time.sleep(0.1)
    raise RuntimeError(f"{url} is not ready after two minutes")


@contextlib.contextmanager
def plain_server(a: argparse.Namespace) -> Iterator[str]:
    sizes = ["-m", a.model, "-c", a.n_ctx, "-np", N_SLOTS, "--kv-unified", "-t", 1, "--no-repack"]
    with rpc_server.serving(1) as device:
        budgets = ["--mem-budget", a.mem_per_node, "--vram-budget", a.mem_per_node, "--rpc", device.endpoint]
        with serving([*sizes, "--dynamic-layers", *budgets]) as server:
            yield f"http://127.0.0.1:{server.port}"


class Nodes:
    """A cluster of this machine: a head with the engines, and a node for each other part."""

    def __init__(self, a: argparse.Namespace, n_groups: int) -> None:
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        self.ray, self.serve = ray, serve
        memory = parse_size(a.mem_per_node)
        head = {"num_cpus": 1 + n_groups, "memory": n_groups * memory, "resources": {"engines": n_groups}}
        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={**head, "include_dashboard": False, "object_store_memory": STORE},
        )
        for _ in range(n_groups):
            self.cluster.add_node(num_cpus=1, memory=memory, object_store_memory=STORE, resources={"parts": 1})
        self.port = free_port("127.0.0.1")
        ray.init(address=self.cluster.address, logging_level="ERROR", log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": self.port})

    def close(self) -> None:
        self.serve.shutdown()
        self.ray.shutdown()
        self.cluster.shutdown()


@contextlib.contextmanager
def groups(a: argparse.Namespace, n: int) -> Iterator[str]:
    import superllama.ray

    memory = parse_size(a.mem_per_node)
    nodes = Nodes(a, n)
    try:
        app = superllama.ray.deployment(
            a.model,
            bundles=[{"CPU": 1, "memory": memory, "engines": 1}, {"CPU": 1, "memory": memory, "parts": 1}],
            replicas=n,
            n_ctx=a.n_ctx,
            n_parallel=N_SLOTS,
            flags={"no_warmup": True, "repack": False},
        )
        nodes.serve.run(app, name="app", route_prefix="/")
        url = f"http://127.0.0.1:{nodes.port}"
        until_ready(url, n)
        yield url
        nodes.serve.delete("app")
    finally:
        nodes.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Requests through Ray Serve against a plain server.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--mem-per-node", required=True, help="budget of a node, as 90MiB")
    parser.add_argument("--n-ctx", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 8])
    parser.add_argument("--rounds", type=int, default=2)
    a = parser.parse_args()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

    places: dict[str, Any] = {
        "superllama-server, one RPC server": plain_server(a),
        "Ray, one group of two nodes": groups(a, 1),
        "Ray, two groups of two nodes": groups(a, 2),
    }
    print("| what | clients | tokens/s, every round | first token, ms |\n|---|---:|---|---|")
    for name, place in places.items():
        with place as url:
            measured(url, 1, 1, 8)
            for n in a.clients:
                found = [measured(url, n, a.requests, a.tokens) for _ in range(a.rounds)]
                speeds = ", ".join(f"{r.tokens_per_s:.1f}" for r in found)
                firsts = ", ".join(f"{1e3 * r.first_token_s:.0f}" for r in found)
                print(f"| {name} | {n} | {speeds} | {firsts} |")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
