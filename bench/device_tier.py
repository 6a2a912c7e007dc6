"""The device tier on an RPC device of this machine: against every static -ngl, and while its budget changes.

    python -m bench.device_tier --model MODEL.gguf [--shares 0.25 0.5 0.75 1] [--turns 5] [--tokens 32]

Part one: at each share of what the whole model takes on the device, --dynamic-layers with that --vram-budget takes
turns with stock's -ngl for the same number of layers, which is the best that fits; each has a server of its own.
Part two: the budget is cut in half in the middle of generation and restored: the time of every token, and how fast
layers move beside the plain upload bandwidth of the device. Prints Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import programs  # noqa: E402


@contextlib.contextmanager
def rpc_server(threads: int) -> Iterator[str]:
    """Its endpoint."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [programs.find("ggml-rpc-server"), "-H", "127.0.0.1", "-p", port, "-t", threads]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


class Probe:
    """A program that decodes the same prompt at every turn."""

    def __init__(self, name: str, args: argparse.Namespace, *flags: object) -> None:
        command = [programs.find(name), "-m", args.model, "--n-prompt", args.prompt, "-n", args.tokens, "-t", 1]
        command += ["-c", args.prompt + args.tokens + 8, "--turns", 1, "--repack", 0, *flags]
        self.child = subprocess.Popen(list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.last: dict[str, object] = {}

    def turn(self) -> tuple[float, float]:
        """Tokens per second: prompt, decode."""
        assert self.child.stdin and self.child.stdout
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        self.last = json.loads(self.child.stdout.readline())
        out: dict[str, float] = self.last  # type: ignore[assignment]
        return out["n_prompt"] / out["prompt_s"], len(self.last["tokens"]) / out["decode_s"]  # type: ignore[arg-type]

    def close(self) -> None:
        assert self.child.stdin
        self.child.stdin.close()
        self.child.wait()


def placements(args: argparse.Namespace) -> None:
    with rpc_server(1) as endpoint:
        whole = Probe("probe", args, "--rpc", endpoint, "-ngl", 99, "--dynamic-layers")
        whole.turn()
        full = int(whole.last["metrics"]["vram_own_bytes"])  # type: ignore[index]
        whole.close()
    print(f"\n{args.model.name}: {full / 1e6:.0f} MB on the device in all\n")
    print("| budget, MB | layers | static prompt | dynamic prompt | ratio | static decode | dynamic decode | ratio |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for share in args.shares:
        with rpc_server(1) as a, rpc_server(1) as b:
            budget = int(full * share) + 1
            ours = Probe("probe", args, "--rpc", a, "-ngl", 99, "--dynamic-layers", "--vram-budget", budget)
            ours.turn()
            layers = n_layers(ours)
            stock = Probe("probe-stock", args, "--rpc", b, "-ngl", layers)
            stock.turn()
            rows = []
            for i in range(args.turns):
                pair = (ours.turn, stock.turn) if i % 2 else (stock.turn, ours.turn)
                x, y = pair[0](), pair[1]()
                rows.append((*x, *y) if i % 2 else (*y, *x))  # ours first
            same = ours.last["hash"] == stock.last["hash"]
            ours.close()
            stock.close()
        prompt, decode, prompt_stock, decode_stock = (median(column) for column in zip(*rows, strict=True))
        ratio = [median(r[i] / r[i + 2] for r in rows) for i in (0, 1)]
        print(
            f"| {budget / 1e6:.0f} | {layers} | {prompt_stock:.1f} | {prompt:.1f} | {ratio[0]:.3f} | "
            f"{decode_stock:.1f} | {decode:.1f} | {ratio[1]:.3f} |{'' if same else ' different logits!'}",
            flush=True,
        )


def n_layers(probe: Probe) -> int:
    """On the device, as -ngl counts: with the output, which is there as soon as any layer is."""
    metrics: dict[str, int] = probe.last["metrics"]  # type: ignore[assignment]
    return metrics["gpu_layers_active"] + (1 if metrics["vram_own_bytes"] > 0 else 0)


def cut(args: argparse.Namespace) -> None:
    import superllama

    with rpc_server(1) as endpoint:
        done = subprocess.run([programs.find("upload"), endpoint], capture_output=True, text=True, check=True)
        upload = float(done.stdout)
    with rpc_server(1) as endpoint:
        superllama.add_rpc_server(endpoint)
        with superllama.Model(args.model, dynamic_layers=True, async_prefetch=True, use_extra_bufts=False) as model:
            ctx = superllama.Context(model, n_ctx=512, n_threads=1)
            ctx.decode(list(range(1, 33)))
            full = ctx.metrics().vram_own_bytes
            print("\n| phase | device layers | first token, ms | 2nd to 5th, ms | later, median ms | moved, MB |")
            print("|---|---:|---:|---:|---:|---:|", flush=True)
            n = max(8, args.tokens)
            move_s = moved = n_moves = 0.0
            for phase, budget in (
                ("full", "auto"),
                ("half", full // 2),
                ("restored", "auto"),
                ("half again", full // 2),
            ):
                before, layers = ctx.metrics(), model.layers()
                begin = time.perf_counter()
                model.set_budget(vram=budget)
                times = []
                for _ in range(n):
                    ctx.decode([1])
                    ctx.logits()
                    now = time.perf_counter()
                    times.append(1e3 * (now - begin))
                    begin = now
                after = ctx.metrics()
                pairs = list(zip(layers, model.layers(), strict=True))
                loaded = [new for old, new in pairs if new.tier == "device" != old.tier]
                evicted = [old for old, new in pairs if old.tier == "device" != new.tier]
                bytes_moved = sum(layer.bytes for layer in loaded + evicted)  # of weights
                if loaded:
                    move_s += (after.move_ms - before.move_ms) / 1e3
                    moved += bytes_moved
                    n_moves += len(loaded)
                on_device = sum(layer.tier == "device" for layer in model.layers())
                print(
                    f"| {phase} | {on_device} | {times[0]:.1f} | {median(times[1:5]):.1f} | {median(times[5:]):.1f} | "
                    f"{bytes_moved / 1e6:.0f} |",
                    flush=True,
                )
            ctx.close()
    print(
        f"\nLoading back: {1e3 * move_s / n_moves:.2f} ms per layer, {moved / move_s / 1e9:.2f} GB/s; "
        f"plain upload {upload / 1e9:.2f} GB/s; ratio {moved / move_s / upload:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="*", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    args = parser.parse_args()
    if args.shares:
        placements(args)
    cut(args)


if __name__ == "__main__":
    main()
