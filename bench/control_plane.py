#!/usr/bin/env python3
"""The control plane measured: a conversation that waits on disk while the memory is given back, and two models that
share one budget in a memory cgroup.

bench/control_plane.py pause MODEL.gguf [--tokens 4000] [--rounds 3]
bench/control_plane.py models FIRST.gguf SECOND.gguf --budget 900MiB --limit 1400MiB [--requests 1000] [--switches 10]

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
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
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


def first_token(server: Server, name: str) -> float:
    body = {"model": name, "prompt": "the old men", "max_tokens": 1, "temperature": 0, "cache_prompt": False}
    return timed(lambda: server.ask("/v1/completions", body))[0]


def switching(models: dict[str, Path], budget: int, n: int, models_max: int) -> list[float]:
    """Seconds until the first token of the model that was not asked last."""
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
            for name in names:
                first_token(server, name)
            found = []
            for k in range(n):
                time.sleep(1.5)  # the other one is idle by then
                found.append(first_token(server, names[k % 2]))
            return found


def models(a: argparse.Namespace) -> None:
    files = {"first": a.first, "second": a.second}
    budget, limit = parse_size(a.budget), parse_size(a.limit)
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
            for _ in range(a.requests):
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
    print(f"| {a.requests} | {seconds:.0f} | {wrong} | {over[0]} | {kills} | {sizes} |\n")

    ours = switching(files, budget, a.switches, 4)
    unloaded = switching(files, budget, a.switches, 1)
    print("| first token of the other model | median, s | all |\n|---|---|---|")
    for label, values in (("both stay, one budget", ours), ("one is unloaded for the other", unloaded)):
        print(f"| {label} | {statistics.median(values):.2f} | {', '.join(f'{v:.2f}' for v in values)} |")
    print(f"\nratio of the medians: {statistics.median(unloaded) / statistics.median(ours):.1f}")


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
    two.set_defaults(run=models)
    a = parser.parse_args()
    a.run(a)


if __name__ == "__main__":
    main()
