#!/usr/bin/env python3
"""The control plane measured: a conversation that waits on disk while the memory is given back, and two models that
share one budget in a memory cgroup.

bench/control_plane.py pause MODEL.gguf [--tokens 4000] [--rounds 3]
bench/control_plane.py models FIRST.gguf SECOND.gguf --budget 900MiB --limit 1400MiB [--requests 1000] [--switches 10]
                                [--tokens 1 32]

Prints Markdown tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import disk_speed
from bench.cgroup import Group, group
from bench.sizes import parse_size
from bench.undo import Journal
from superllama._programs import find_program, program_environment

MIB = 1 << 20
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "old", "men", "count", "sheep"]


class Server:
    """superllama-server, or a router, on a free port; in a group, if one is given."""

    def __init__(self, flags: list[object], folder: Path, inside: Group | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        program = Path(find_program("llama-server"))
        command = [program, "--port", self.port, "--no-ui", "--no-warmup", *flags]
        environment = program_environment(program, os.environ | {"XDG_RUNTIME_DIR": str(folder)})
        with (folder / "log").open("ab") as log:
            self.process = subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=log, env=environment, preexec_fn=inside and inside.enter
            )
        while True:
            if self.process.poll() is not None:
                raise RuntimeError((folder / "log").read_text(errors="replace")[-2000:])
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10).close()
                return
            time.sleep(0.05)

    def ask(self, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return json.load(answer)

    def first_piece(self, path: str, body: dict[str, object]) -> float:
        """Seconds until a streamed answer begins; returns at its end."""
        data = json.dumps(body | {"stream": True}).encode()
        begin = time.perf_counter()
        with urllib.request.urlopen(
            urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data), timeout=600
        ) as answer:
            answer.readline()
            seconds = time.perf_counter() - begin
            answer.read()
        return seconds

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@contextlib.contextmanager
def serving(flags: list[object], inside: Group | None = None) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(flags, Path(folder), inside)
        try:
            yield server
        finally:
            server.close()


def timed(call: Any) -> tuple[float, Any]:
    begin = time.perf_counter()
    found = call()
    return time.perf_counter() - begin, found


# ---------------------------------------------------------------- a pause


def pause(a: argparse.Namespace) -> None:
    print("| tokens | computed again, s | resume and next token, s | ratio | pause, s | MiB while paused |")
    print("|---" * 6 + "|")
    for _ in range(a.rounds):
        print(pause_once(a.model, a.tokens))


def pause_once(model: Path, n_tokens: int) -> str:
    words = " ".join(random.Random(1).choices(WORDS, k=2 * n_tokens))
    with serving(["-m", model, "-c", n_tokens + 512, "-np", 1, "--cache-ram", 0]) as server:
        tokens = server.ask("/tokenize", {"content": words})["tokens"][:n_tokens]
        body = {"prompt": tokens, "n_predict": 1, "temperature": 0}
        again, _ = timed(lambda: server.ask("/completion", body))
        gone, _ = timed(lambda: server.ask("/superllama/pause", {}))
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        resident = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) >> 10

        def back() -> Any:
            server.ask("/superllama/resume", {})
            return server.ask("/completion", body | {"prompt": [*tokens, 5]})

        resumed, answer = timed(back)
        assert answer["timings"]["cache_n"] >= len(tokens) - 1, answer["timings"]
        return f"| {len(tokens)} | {again:.2f} | {resumed:.2f} | {again / resumed:.1f} | {gone:.2f} | {resident} |"


# ---------------------------------------------------------------- two models


def preset(folder: Path, models: dict[str, Path]) -> Path:
    path = folder / "models.ini"
    sections = "".join(f"[{name}]\nmodel = {file.resolve()}\n" for name, file in models.items())
    path.write_text(f"version = 1\n[*]\nc = 1024\nparallel = 1\nub = 64\nasync-prefetch = true\n{sections}")
    return path


def first_token(server: Server, name: str, n_tokens: int) -> float:
    body = {"model": name, "prompt": "the old men", "max_tokens": n_tokens, "temperature": 0, "ignore_eos": True}
    return server.first_piece("/v1/completions", body | {"cache_prompt": False})


@dataclass(frozen=True)
class Switch:
    seconds: float  # until the first token
    bytes_all: int = 0  # of the weights that come and go
    bytes_there: int = 0  # of them, in memory before the request
    bytes_read: int = 0  # for the answer, and ahead for the next token


def quiet(server: Server, name: str) -> Any:
    """What a server says of its model, once it reads nothing."""
    while (found := server.ask(f"/superllama?model={name}"))["metrics"]["prefetch_pending"] > 0:
        time.sleep(0.01)
    return found


def switch(server: Server, name: str, n_tokens: int, looks: bool) -> Switch:
    before = quiet(server, name) if looks else None
    seconds = first_token(server, name, n_tokens)
    if before is None:
        return Switch(seconds)
    read = quiet(server, name)["metrics"]["weight_bytes_read"] - before["metrics"]["weight_bytes_read"]
    there, everything = (sum(layer[key] for layer in before["layers"]) for key in ("bytes_resident", "bytes"))
    return Switch(seconds, everything, there, read)


def switching(
    models: dict[str, Path], budget: int, n: int, models_max: int, n_tokens: int
) -> tuple[list[Switch], float]:
    """First tokens of the model that was not asked last, where answers have so many; and of one that was."""
    names = list(models)
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--models-preset",
            preset(Path(folder), models),
            "--mem-budget",
            budget,
            "--models-max",
            models_max,
        ]
        with serving(flags) as server:
            found = []
            for k in range(2 + n + n % 2):
                found.append(switch(server, names[k % 2], n_tokens, models_max > 1 and k >= 2))
                time.sleep(1.5)  # it is idle by then
            again = [first_token(server, names[1], 8) for _ in range(4)]
            return found[2:], statistics.median(again[1:])  # without the loads, and once it has what it needs


def disk_speed_of(files: dict[str, Path]) -> float:
    return statistics.median(disk_speed.measure(file).bytes_per_s for file in files.values() for _ in range(2))


def switches(files: dict[str, Path], budget: int, a: argparse.Namespace) -> None:
    print("| tokens of each answer | unload and load, s | both stay, s | ratio | without a switch, s |", end="")
    print(f" there before, MiB | read, MiB | the disk alone, s | all: unload and load | both stay |\n{'|---' * 10}|")
    mid = statistics.median
    for n_tokens in a.tokens:
        speeds = [disk_speed_of(files)]
        both, again = switching(files, budget, a.switches, 4, n_tokens)
        speeds.append(disk_speed_of(files))
        one, _ = switching(files, budget, a.switches, 1, n_tokens)
        ours, theirs = (mid(s.seconds for s in found) for found in (both, one))
        there, everything = mid(s.bytes_there for s in both), both[0].bytes_all
        bounds = "-".join(f"{(everything - there) / speed:.2f}" for speed in sorted(speeds, reverse=True))
        each = " | ".join(", ".join(f"{s.seconds:.2f}" for s in found) for found in (one, both))
        print(
            f"| {n_tokens} | {theirs:.2f} | {ours:.2f} | {theirs / ours:.1f} | {again:.2f} "
            f"| {there / MIB:.0f} of {everything / MIB:.0f} | {mid(s.bytes_read for s in both) / MIB:.0f} | {bounds} "
            f"| {each} |",
            flush=True,
        )


def models(a: argparse.Namespace) -> None:
    files = {"first": a.first, "second": a.second}
    budget, limit = parse_size(a.budget), parse_size(a.limit)
    if a.requests > 0:
        random_requests(files, budget, limit, a.requests)
    switches(files, budget, a)


def random_requests(files: dict[str, Path], budget: int, limit: int, n_requests: int) -> None:
    rng = random.Random(1)
    with Journal() as journal, group(journal, limit) as inside, tempfile.TemporaryDirectory() as folder:
        flags = ["--models-preset", preset(Path(folder), files), "--mem-budget", budget]
        with serving(flags, inside) as server:
            over, done = [0], threading.Event()

            def look() -> None:
                while not done.wait(0.02):
                    with contextlib.suppress(OSError):
                        pool = server.ask("/superllama")["pool"]
                        over[0] = max(over[0], pool["leased_bytes"] - pool["total_bytes"])

            watcher = threading.Thread(target=look)
            watcher.start()
            expected: dict[Any, str] = {}
            wrong, begin = 0, time.perf_counter()
            for _ in range(n_requests):
                name, n = rng.choice(list(files)), rng.randrange(1, 12)
                prompt = " ".join(rng.choices(WORDS, k=2)) if rng.random() < 0.2 else "the old men"
                body = {"model": name, "prompt": prompt, "max_tokens": n, "temperature": 0, "cache_prompt": False}
                text = server.ask("/v1/completions", body)["choices"][0]["text"]
                wrong += expected.setdefault((name, prompt, n), text) != text
            seconds = time.perf_counter() - begin
            done.set()
            watcher.join()
            kills, peak = inside.oom_kills(), inside.peak()
    print("| requests | seconds | other texts | over the budget, bytes | OOM kills | peak of the group | limit |")
    print(f"{'|---' * 7}|")
    sizes = f"{peak / MIB:.0f} MiB | {limit / MIB:.0f} MiB"
    print(f"| {n_requests} | {seconds:.0f} | {wrong} | {over[0]} | {kills} | {sizes} |\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("pause")
    one.add_argument("model", type=Path)
    one.add_argument("--tokens", type=int, default=4000)
    one.add_argument("--rounds", type=int, default=3)
    one.set_defaults(run=pause)
    two = commands.add_parser("models")
    two.add_argument("first", type=Path)
    two.add_argument("second", type=Path)
    two.add_argument("--budget", required=True)
    two.add_argument("--limit", required=True, help="of the memory cgroup")
    two.add_argument("--requests", type=int, default=1000)
    two.add_argument("--switches", type=int, default=10)
    two.add_argument("--tokens", type=int, nargs="+", default=[1, 32], help="of each answer between two switches")
    two.set_defaults(run=models)
    a = parser.parse_args()
    a.run(a)


if __name__ == "__main__":
    main()
