"""Bytes that cross the network when a model is loaded on an RPC server that has the file, and when it has not.

    python -m bench.rpc_weights --model MODEL.gguf [--threads 1]

The server is on this machine, its client is connected by way of something that counts. Each load is a process of its
own: static (`-ngl 99`) and with dynamic layers, without and with --model-dir; with it twice, for what the first load
leaves behind. Prints Markdown, and what the server's look through the file took.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from bench import rpc_server
from bench.counting import Counter

LOAD = """
import sys, time
import superllama

superllama.add_rpc_server(sys.argv[2])
began = time.monotonic()
model = superllama.Model(sys.argv[1], n_gpu_layers=99, dynamic_layers=sys.argv[3] == "dynamic")
ctx = superllama.Context(model, n_ctx=64, n_threads=1)
ctx.decode([1])
print(time.monotonic() - began, int(ctx.logits()[0].argmax()))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    size = args.model.stat().st_size
    print(f"{args.model.name}, {size / 1e6:.0f} MB\n")
    print("| server | load | to the server, MB | back, MB | of the model | seconds | first token |")
    print("|---|---|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "models").mkdir()
        (Path(folder) / "models" / "model.gguf").symlink_to(args.model.resolve())
        for name, flags in (("without", ()), ("--model-dir", ("--model-dir", Path(folder) / "models"))):
            cache = {"SUPERLLAMA_CACHE": f"{folder}/cache"}
            with rpc_server.serving(args.threads, *flags, environment=cache) as server:
                for how in ("static", "dynamic"):
                    for load in ("first", "second") if flags else ("first",):
                        with Counter(server.endpoint) as counter:
                            command = [sys.executable, "-c", LOAD, args.model, counter.endpoint, how]
                            environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
                            done = subprocess.run(
                                list(map(str, command)), stdout=subprocess.PIPE, text=True, check=True, env=environment
                            )
                        seconds, token = done.stdout.split()
                        print(
                            f"| {name} | {how}, {load} | {counter.sent / 1e6:.2f} | {counter.received / 1e6:.2f} | "
                            f"{100 * counter.total / size:.2f} % | {float(seconds):.1f} | {token} |",
                            flush=True,
                        )
        with rpc_server.serving(args.threads, *flags, environment=cache) as again:
            first_s, again_s = server.ready_s, again.ready_s
            print(f"\nReady to serve: {first_s:.1f} s the first time, {again_s:.1f} s with what the cache keeps.")


if __name__ == "__main__":
    main()
