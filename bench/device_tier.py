"""The device tier: against every static -ngl, while its budget changes, and how fast layers move.

    python -m bench.device_tier --model MODEL.gguf [--shares 0.25 0.5 0.75 1] [--turns 60] [--rounds 10]
                                [--contexts 512 2048 8192] [--filled 0.75] [--gpu]

The device is an RPC server on this machine, or with --gpu the first one of this build. Placements: at each share of
what the whole model takes there, --dynamic-layers with that --vram-budget takes turns with stock's -ngl for the same
number of layers, which is the best that fits; both stay loaded, each with a server of its own. Phases: the budget is
cut in half in the middle of generation and restored. Moves: loading back from host memory and from the file, in turns
with plain uploads to the device (a server of its own again) and direct reads of the file. Growth: longer and longer
contexts, each filled to a part, on a device that is full with the first; with the standard KV cache and with pages.
Prints Markdown; ratios are medians of the pairs with their 95 % intervals.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import mmap
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import superllama

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import programs, rpc_server  # noqa: E402
from bench.off_is_stock import REST_S, interval  # noqa: E402
from bench.sizes import parse_size  # noqa: E402
from bench.turns import TurnTaker  # noqa: E402

PLAIN = ("8 MiB at a time", "256 KiB at a time", "8 MiB, into fresh buffers", "256 KiB, into fresh buffers")


@contextlib.contextmanager
def device(args: argparse.Namespace) -> Iterator[list[str]]:
    """A device of its own: HOST:PORT of a server, or nothing for the GPU."""
    if args.gpu:
        yield []
        return
    with rpc_server.serving(args.threads) as server:
        yield [server.endpoint]


class Probe:
    """A program that decodes the same prompt at every turn."""

    def __init__(self, name: str, args: argparse.Namespace, place: list[str], *flags: object) -> None:
        command = [
            programs.find(name),
            "-m",
            args.model,
            "--n-prompt",
            args.prompt,
            "-n",
            args.tokens,
            "-t",
            args.threads,
        ]
        command += ["-c", args.prompt + args.tokens + 8, "--turns", 1, "--repack", 0, *flags]
        for endpoint in place:
            command += ["--rpc", endpoint]
        self.program = TurnTaker(command)
        self.last: dict[str, object] = {}

    def turn(self) -> tuple[float, float]:
        """Tokens per second: prompt, decode."""
        self.last = json.loads(self.program.ask())
        out: dict[str, float] = self.last  # type: ignore[assignment]
        time.sleep(REST_S)
        return out["n_prompt"] / out["prompt_s"], len(self.last["tokens"]) / out["decode_s"]  # type: ignore[arg-type]

    def close(self) -> None:
        self.program.close()


def with_interval(ratios: list[float]) -> str:
    low, high = interval(ratios)
    return f"{median(ratios):.3f} ({low:.3f}-{high:.3f})"


def placements(args: argparse.Namespace) -> None:
    with device(args) as place:
        whole = Probe("probe", args, place, "-ngl", 99, "--dynamic-layers")
        whole.turn()
        full = int(whole.last["metrics"]["vram_own_bytes"])  # type: ignore[index]
        whole.close()
    print(f"\n{args.model.name}, {args.turns} turns: {full / 1e6:.0f} MB on the device in all\n")
    print("| budget, MB | layers | what | static, tok/s | dynamic, tok/s | ratio (95 %) | logits |")
    print("|---:|---:|---|---:|---:|---|---|")
    for share in args.shares:
        budget = int(full * share) + 1
        with device(args) as a, device(args) as b:
            ours = Probe("probe", args, a, "-ngl", 99, "--dynamic-layers", "--vram-budget", budget)
            ours.turn()
            stock = Probe("probe-stock", args, b, "-ngl", n_layers(ours))
            stock.turn()
            rows = []
            for i in range(args.turns):
                pair = (ours.turn, stock.turn) if i % 2 else (stock.turn, ours.turn)
                x, y = pair[0](), pair[1]()
                rows.append((*x, *y) if i % 2 else (*y, *x))  # ours first
            same = ours.last["hash"] == stock.last["hash"]
            ours.close()
            stock.close()
        for i, what in enumerate(("prompt", "decode")):
            print(
                f"| {budget / 1e6:.0f} | {n_layers(ours)} | {what} | {median(r[i + 2] for r in rows):.1f} | "
                f"{median(r[i] for r in rows):.1f} | {with_interval([r[i] / r[i + 2] for r in rows])} | "
                f"{'identical' if same else 'DIFFERENT'} |",
                flush=True,
            )


def n_layers(probe: Probe) -> int:
    """On the device, as -ngl counts: with the output, which is there as soon as any layer is."""
    metrics: dict[str, int] = probe.last["metrics"]  # type: ignore[assignment]
    return metrics["gpu_layers_active"] + (1 if metrics["vram_own_bytes"] > 0 else 0)


def open_model(args: argparse.Namespace, place: list[str]) -> tuple[superllama.Model, superllama.Context]:
    """Host weights as in the file, so that they can be sent as they are."""
    for endpoint in place:
        superllama.add_rpc_server(endpoint)
    model = superllama.Model(args.model, dynamic_layers=True, async_prefetch=True, use_extra_bufts=False)
    ctx = superllama.Context(model, n_ctx=512, n_threads=args.threads)
    ctx.decode(list(range(1, 33)))
    return model, ctx


def phases(args: argparse.Namespace, model: superllama.Model, ctx: superllama.Context, half: int) -> None:
    print(f"\n{args.model.name}\n\n| phase | device layers | first token, ms | 2nd to 5th, ms | later, median ms |")
    print("|---|---:|---:|---:|---:|", flush=True)
    for phase, budget in (("full", "auto"), ("half", half), ("restored", "auto")):
        begin = time.perf_counter()
        model.set_budget(vram=budget)
        times = []
        for _ in range(max(8, args.tokens)):
            ctx.decode([1])
            ctx.logits()
            now = time.perf_counter()
            times.append(1e3 * (now - begin))
            begin = now
        on_device = sum(layer.tier == "device" for layer in model.layers())
        print(
            f"| {phase} | {on_device} | {times[0]:.1f} | {median(times[1:5]):.1f} | {median(times[5:]):.1f} |",
            flush=True,
        )


def growth(args: argparse.Namespace, place: list[str]) -> None:
    for endpoint in place:
        superllama.add_rpc_server(endpoint)
    print(f"\n{args.model.name}\n")
    print("| context | tokens | KV cache | device layers | on the device, MB | prompt, tok/s | decode, tok/s |")
    print("|---:|---:|---|---:|---:|---:|---:|", flush=True)
    budget: int | str = "auto"
    for n_ctx, paged in [(n_ctx, paged) for n_ctx in args.contexts for paged in (False, True)]:
        n_tokens = int(args.filled * n_ctx)
        with superllama.Model(args.model, dynamic_layers=True, async_prefetch=True, vram_budget=budget) as model:
            kwargs = {"n_ctx": n_ctx, "n_threads": args.threads, "flash_attn": "on", "paged_kv": paged}
            with superllama.Context(model, **kwargs) as ctx:
                begin = time.perf_counter()
                ctx.decode([i % 1000 + 10 for i in range(n_tokens)])
                ctx.logits()
                prompt_s = time.perf_counter() - begin
                begin = time.perf_counter()
                for _ in range(args.tokens):
                    ctx.decode([1])
                    ctx.logits()
                decode_s = time.perf_counter() - begin
                used = int(ctx.metrics().vram_own_bytes)
            on_device = sum(layer.tier == "device" for layer in model.layers())
        budget = used if budget == "auto" else budget
        print(
            f"| {n_ctx} | {n_tokens} | {'in pages' if paged else 'standard'} | {on_device} | "
            f"{used / 1e6:.0f} of {int(budget) / 1e6:.0f} | {n_tokens / prompt_s:.1f} | {args.tokens / decode_s:.1f} |",
            flush=True,
        )


class Upload:
    """A program that uploads once at every turn."""

    def __init__(self, place: list[str], n_bytes: int, buffer_bytes: int) -> None:
        command = [programs.find("upload"), str(n_bytes >> 20), str(buffer_bytes), *place]
        self.program = TurnTaker(command)

    def turn(self) -> tuple[float, ...]:
        """Bytes per second: in messages of 8 MiB, of 256 KiB, and both into fresh buffers."""
        return tuple(map(float, self.program.ask().split()))

    def close(self) -> None:
        self.program.close()


def read_directly(path: Path, n_bytes: int) -> float:
    """Bytes per second of the file, one request of 4 MiB after another."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, 4 << 20) as buffer:
        begin, done = time.perf_counter(), 0
        while done < n_bytes and (n := os.preadv(fd, [buffer], done)) == len(buffer):
            done += n
        seconds = time.perf_counter() - begin
    os.close(fd)
    return done / seconds


@dataclass
class Move:
    """Layers loaded onto the device, with their KV."""

    n: int
    n_bytes: int
    seconds: float

    @property
    def rate(self) -> float:
        return self.n_bytes / self.seconds


def move_there(model: superllama.Model, ctx: superllama.Context) -> Move:
    before, layers = ctx.metrics(), model.layers()
    model.set_budget(vram="auto")
    loaded = [new for old, new in zip(layers, model.layers(), strict=True) if new.tier == "device" != old.tier]
    after = ctx.metrics()
    return Move(len(loaded), after.vram_own_bytes - before.vram_own_bytes, (after.move_ms - before.move_ms) / 1e3)


def moves(args: argparse.Namespace, model: superllama.Model, ctx: superllama.Context, half: int) -> None:
    """The token after a cut makes the host read what it needs, so that it comes from memory."""
    with device(args) as place:
        plain = Upload(place, args.upload, max(layer.bytes for layer in model.layers()[:-1]))
        plain.turn()
        from_memory, from_file, uploads, reads = [], [], [], []
        for _ in range(args.rounds):
            uploads.append(plain.turn())
            model.set_budget(vram=half)
            ctx.decode([1])
            ctx.logits()
            from_memory.append(move_there(model, ctx))
            reads.append(read_directly(args.model, args.upload))
            model.set_budget(vram=half)
            from_file.append(move_there(model, ctx))
        plain.close()
    print(f"\n{args.model.name}, {args.rounds} rounds, medians\n\n| plain upload | GB/s |\n|---|---:|")
    for i, name in enumerate(PLAIN):
        print(f"| {name} | {median(u[i] for u in uploads) / 1e9:.2f} |")
    print(f"| direct reads of the file | {median(reads) / 1e9:.2f} |\n")
    print("| layers from | n | MB each | ms each | GB/s | of plain, 8 MiB (95 %) | 256 KiB | both fresh | | of reads |")
    print("|---|---:|---:|---:|---:|---|---|---|---|---|")
    for name, done in (("host memory", from_memory), ("file", from_file)):
        shares = [
            with_interval([move.rate / u[i] for move, u in zip(done, uploads, strict=True)]) for i in range(len(PLAIN))
        ]
        of_reads = with_interval([move.rate / read for move, read in zip(done, reads, strict=True)])
        print(
            f"| {name} | {done[0].n} | {done[0].n_bytes / done[0].n / 1e6:.1f} | "
            f"{median(1e3 * m.seconds / m.n for m in done):.2f} | {median(m.rate for m in done) / 1e9:.2f} | "
            f"{' | '.join(shares)} | {of_reads if name == 'file' else ''} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--gpu", action="store_true", help="the first GPU of this build instead of an RPC server")
    parser.add_argument("--shares", type=float, nargs="*", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--turns", type=int, default=60, help="of each placement")
    parser.add_argument("--rounds", type=int, default=10, help="of moves")
    parser.add_argument("--upload", type=parse_size, default=parse_size("512MiB"), help="of each plain one, and read")
    parser.add_argument("--contexts", type=int, nargs="*", default=[512, 2048, 8192], help="cells")
    parser.add_argument("--filled", type=float, default=0.75, help="part of each of these contexts")
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="of the program and of the server")
    args = parser.parse_args()
    if args.turns > 0:
        placements(args)
    if args.rounds > 0:
        with device(args) as place:
            model, ctx = open_model(args, place)
            half = int(ctx.metrics().vram_own_bytes) // 2
            phases(args, model, ctx, half)
            moves(args, model, ctx, half)
            ctx.close()
            model.close()
    if args.contexts:
        with device(args) as place:
            growth(args, place)


if __name__ == "__main__":
    main()
