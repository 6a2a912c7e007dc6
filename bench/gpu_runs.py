"""Runs on a card, each in a process of its own, and placements of stock that were tried in such runs."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench import bound, card, page_cache, placement, rpc_server
from bench.gpu_turn import CONTEXT_MARGIN, OUT_OF_MEMORY, Result, Spec
from bench.peak import Peak
from bench.placement import Placement
from bench.pressure import Pressure, pressure
from bench.sizes import format_size
from bench.undo import Journal

TIMEOUT_S = 900  # of a run, loading included
NO_MEMORY = re.compile(r"out of (\w+ )?memory|OutOf\w*Memory|(failed|unable) to allocate|bad_alloc|MemoryError", re.I)


def note(text: str) -> None:
    """How far it is."""
    print(text, file=sys.stderr, flush=True)


@dataclass
class Runner:
    """Starts runs, one after the other."""

    model: Path
    prompts: list[int]
    tokens: int
    threads: int
    n_ubatch: int
    nvml: card.Nvml | None  # that sees how much of the card a run takes; None: only the run itself does
    headroom: int  # bytes beside the host's budget
    limits_host: bool  # whether a memory cgroup can be made
    server_threads: int = 0  # > 0: the card of each run is an RPC server of its own with so many

    def spec(self, model_params: Mapping[str, object], context_params: Mapping[str, object]) -> Spec:
        n_ctx = max(self.prompts) + self.tokens + CONTEXT_MARGIN
        if self.server_threads:  # which computes with weights as they are in the file
            model_params = {**model_params, "use_extra_bufts": False}
        return Spec(
            str(self.model), self.prompts, self.tokens, self.threads, self.n_ubatch, n_ctx, dict(model_params),
            dict(context_params), self.nvml is None and not self.server_threads,
        )  # fmt: skip

    def run(self, spec: Spec, host: int | None = None) -> Result:
        """`host`: bytes of memory that the run may have, and --headroom; None: all there is."""
        with contextlib.ExitStack() as stack:
            limits = None
            if host is not None and self.limits_host:
                page_cache.evict(self.model)  # cached pages are charged to whom they were read for
                journal = stack.enter_context(Journal())
                limits = stack.enter_context(pressure(journal, host + self.headroom, "cgroup"))
            if self.server_threads:
                server = stack.enter_context(rpc_server.serving(self.server_threads))
                peak = stack.enter_context(contextlib.closing(Peak(server.in_use)))
                result = _run(replace(spec, server=server.endpoint), limits)
                return replace(result, vram_bytes=peak.rise())
            if self.nvml is None:
                return _run(spec, limits)
            peak = stack.enter_context(contextlib.closing(Peak(self.nvml.used)))
            return replace(_run(spec, limits), vram_bytes=peak.rise())


def _run(spec: Spec, limits: Pressure | None) -> Result:
    with start(spec, {}, limits) as child:
        try:
            printed, errors = child.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return Result(error=f"took more than {TIMEOUT_S} s")
    if limits and limits.oom_kills():
        return Result(error=OUT_OF_MEMORY)
    return result_of(printed, errors, child.returncode)


@contextlib.contextmanager
def start(
    spec: Spec, environment: Mapping[str, str], limits: Pressure | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A run's process, killed at the end of the block if it lives."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(vars(spec), file)
        file.flush()
        child = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu_turn", file.name], cwd=card.ROOT, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**card.visible(), **environment}, preexec_fn=limits.enter if limits else None,
        )  # fmt: skip
        try:
            yield child
        finally:
            child.kill()
            child.wait()


def result_of(printed: str, errors: str, code: int) -> Result:
    """What a run's process has said, or why it has said nothing."""
    last = printed.splitlines()[-1:]
    result = Result(**json.loads(last[0])) if last and last[0].startswith("{") else Result()
    if code == 0 and not result.error and last:
        return result
    if NO_MEMORY.search(errors + result.error):
        return Result(error=OUT_OF_MEMORY)
    said = [" ".join(result.error.split()), *reversed(errors.strip().splitlines())]
    return Result(error=next(filter(None, said), f"ended with {code} and said nothing"))


@dataclass
class Stock:
    """Stock's placements. What was measured of one is kept, for all rows."""

    runner: Runner
    weights: bound.Weights
    peaks: dict[Placement, int | None] = field(default_factory=dict)
    speeds: dict[Placement, float] = field(default_factory=dict)

    def spec(self, where: Placement) -> Spec:
        return self.runner.spec(where.model_params(), where.context_params())

    def peak(self, where: Placement) -> int | None:
        """Bytes of the card; None if it does not run. One ubatch and a token show it: nothing is allocated after."""
        if where not in self.peaks:
            spec = self.spec(where)
            result = self.runner.run(replace(spec, prompts=[min(max(spec.prompts), spec.n_ubatch)], tokens=1))
            self.peaks[where] = None if result.error else result.vram_bytes
            note(f"  stock, {where}: {result.error or format_size(result.vram_bytes)}")
        return self.peaks[where]

    def speed(self, where: Placement) -> float:
        """Tokens/s of decoding; 0 if it does not run."""
        if where not in self.speeds:
            spec = self.spec(where)
            result = self.runner.run(replace(spec, prompts=spec.prompts[:1]))
            self.speeds[where] = 0.0 if result.error else result.decode
            note(f"  stock, {where}: {self.speeds[where]:.2f} tok/s")
        return self.speeds[where]

    def best(self, limit: int) -> Placement:
        """Nothing on the card where even that takes more than the limit, as buffers for prompts may."""
        found = placement.best(self.peak, self.speed, limit, self.weights.n_layer, self.weights.moe)
        return found or Placement(0)
