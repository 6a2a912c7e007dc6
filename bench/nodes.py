"""A plan of RPC servers on this machine beside what they do: layers, bytes of a load and of a token, a token's time.

    python -m bench.nodes --model MODEL.gguf --memory 200MiB,200MiB [--tokens 64]

Servers are on loopback, each behind something that counts. The plan is given this machine's rates and the round trip
that is measured to the counter; both servers share its cores, as they compute one after another. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import superllama
from superllama import _plan_spec

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench.counting import Counter
from bench.rpc_weights import server

CONTEXT = {"n_ctx": 1024, "n_ubatch": 128}
# Says when it begins with another part, and goes on when it is told to.
CLIENT = """
import json, sys, time
import superllama

path, n_threads, n_tokens, budgets = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(",")
for endpoint in sys.argv[5:]:
    superllama.add_rpc_server(endpoint)
def step(**said):
    print(json.dumps(said), flush=True)
    sys.stdin.readline()
model = superllama.Model(path, dynamic_layers=True, async_prefetch=True, vram_budget=budgets)
ctx = superllama.Context(model, n_ctx=1024, n_ubatch=128, n_threads=n_threads)
step()
ctx.decode([1] * 900)
for _ in range(3):
    ctx.decode([1])
step(devices=[layer.device or "" for layer in model.layers()])
began = time.perf_counter()
for _ in range(n_tokens):
    ctx.decode([1])
    ctx.logits()
step(seconds=(time.perf_counter() - began) / n_tokens)
"""


def round_trip() -> float:
    """Seconds for a byte and its answer by way of two connections on loopback: the median of some."""
    listener = socket.create_server(("127.0.0.1", 0))

    def echo() -> None:
        peer, _ = listener.accept()
        while data := peer.recv(64):
            peer.sendall(data)

    threading.Thread(target=echo, daemon=True).start()
    with Counter(f"127.0.0.1:{listener.getsockname()[1]}") as counter:
        host, _, port = counter.endpoint.rpartition(":")
        with socket.create_connection((host, int(port))) as end:
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            times = []
            for _ in range(200):
                began = time.perf_counter()
                end.sendall(b"x")
                end.recv(1)
                times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--memory", default="200MiB,200MiB", help="--vram-budget of each server")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    budgets = args.memory.split(",")
    trip = round_trip()
    nodes = [
        {"name": f"n{i}", "memory": "1TiB", "budget": budget, "network": "2GB/s", "round_trip": trip}
        for i, budget in enumerate(budgets)
    ]
    plan = superllama.plan_nodes(args.model, _plan_spec.parse_spec({"node": nodes}), n_threads=args.threads, **CONTEXT)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        counters = []
        for i in range(len(budgets)):
            endpoint, _ = stack.enter_context(server(args, f"{folder}/{i}"))
            counters.append(stack.enter_context(Counter(endpoint)))
        command = [sys.executable, "-c", CLIENT, args.model, args.threads, args.tokens, args.memory]
        client = subprocess.Popen(
            [*map(str, command), *(c.endpoint for c in counters)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert client.stdin is not None and client.stdout is not None
        said, counts = [], []
        for _ in range(3):
            said.append(json.loads(client.stdout.readline()))
            counts.append([(c.sent, c.received) for c in counters])
            client.stdin.write("\n")
            client.stdin.flush()
        client.wait()
    (_, placed, ran), (load, before, after) = said, counts
    print(f"{args.model.name}, {plan.n_layers} layers, servers with {args.memory}, round trip {1e6 * trip:.0f} us\n")
    print("| server | layers, planned | layers | load, planned MB | load, MB | token, planned bytes | token, bytes |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for i, share in enumerate(plan.shares[1:]):
        n_layers = placed["devices"].count(f"RPC{i}")
        of_token = (sum(after[i]) - sum(before[i])) / args.tokens
        print(
            f"| {share.name} | {share.n_layers} | {n_layers} | {share.load_bytes / 1e6:.2f} | "
            f"{sum(load[i]) / 1e6:.2f} | {share.sent_bytes + share.received_bytes} | {of_token:.0f} |"
        )
    planned = 1e3 * plan.seconds_per_token if plan.seconds_per_token else float("nan")
    print(f"\nA token: {planned:.2f} ms planned, {1e3 * ran['seconds']:.2f} ms.")


if __name__ == "__main__":
    main()
