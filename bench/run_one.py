"""Do one run: cold cache, less memory, settings, tracers, a fresh process; write what was seen to its folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from bench import device, engine, first_touch, page_cache
from bench.job import Job
from bench.pressure import Pressure, pressure
from bench.trace import blkparse, block, mapping, reader, table, tensors
from bench.trace.counters import Sampler
from bench.trace.extents import Extents, read_extents
from bench.undo import Journal

TIMEOUT_S = 900


@dataclass
class Model:
    """What is known of a model's file; read once, used by all its runs."""

    path: Path
    where: tensors.TensorMap
    disk: device.Disk | None
    extents: Extents | None

    @classmethod
    def open(cls, path: Path) -> Model:
        disk = device.disk_of(path)
        extents = None
        if disk:
            with contextlib.suppress(OSError):
                extents = read_extents(path, disk.start)
        return cls(path, tensors.read_map(path), disk, extents)


@dataclass
class Outcome:
    result: dict
    skipped: list[str] = field(default_factory=list)  # one line for each thing that could not be done here


@contextlib.contextmanager
def settings(journal: Journal, job: Job, model: Model, p: Pressure, skipped: list[str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        wanted: list[tuple[Path, int]] = []
        if job.swappiness is not None:
            if p.group:
                p.group.set_swappiness(job.swappiness)
            wanted.append((Path("/proc/sys/vm/swappiness"), job.swappiness))
        if job.read_ahead_kb is not None and model.disk:
            wanted.append((model.disk.read_ahead, job.read_ahead_kb))
        for path, value in wanted:
            try:
                stack.enter_context(journal.setting(path, str(value)))
            except OSError as error:
                skipped.append(f"{path} not set to {value}: {error.strerror}; it needs root")
        yield


@contextlib.contextmanager
def block_trace(journal: Journal, job: Job, model: Model, skipped: list[str]) -> Iterator[block.TracefsTracer | None]:
    tool, why = block.available(job.block_tracer) if job.block_tracer != "none" else (None, "")
    if not (tool and model.disk and model.extents is not None and len(model.extents)):
        if why:
            skipped.append(why)
        yield None
        return
    try:
        tracer = block.tracer(tool, journal, model.disk, model.extents)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        skipped.append(f"block trace by {tool} failed: {error}")
        yield None
        return
    try:
        yield tracer
    finally:
        tracer.close()


def wait(child: subprocess.Popen, timeout_s: float) -> bool:
    """Until it has ended, without reaping it: its counters stay readable. True = it had to be killed."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        child.send_signal(signal.SIGKILL)

    timer = threading.Timer(timeout_s, kill)
    timer.daemon = True
    timer.start()
    try:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    finally:
        timer.cancel()
    return late.is_set()


def run(
    job: Job, model: Model, journal: Journal, out: Path, build: Path | None = None, reader_trace: Path | None = None,
    timeout_s: float = TIMEOUT_S, light: bool = False,
) -> Outcome:  # fmt: skip
    """The folder `out` appears when everything in it is complete. light: no samples of the page cache."""
    skipped: list[str] = []
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    size = model.path.stat().st_size
    budget = job.budget(size)
    limit = None if budget is None else budget + job.headroom
    program = engine.get(job.engine)
    command = program.command(model.path, job.tokens, job.prompt_tokens, budget, job.threads, job.flags, build)
    trace_file = reader_trace or partial / "reader.txt"
    environment = program.environment(model.path) | {reader.ENV: str(trace_file)}

    page_cache.evict(model.path)
    if not page_cache.drop_all():
        skipped.append("the model's file alone was dropped from the page cache: dropping all of it needs root")
    first_touch.touch(limit or size)
    with (
        pressure(journal, limit, job.pressure, build=build) as p,
        settings(journal, job, model, p, skipped),
        block_trace(journal, job, model, skipped) as tracer,
        (partial / "stdout").open("w") as stdout,
        (partial / "stderr").open("w") as stderr,
    ):
        if tracer:
            tracer.start()
        child = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment, preexec_fn=p.enter)
        with journal.process(child):
            slow = 0.0 if light else 0.5
            sampler = Sampler(child.pid, p.group, model.disk, model.path, model.where, 0.1, slow)
            sampler.start()
            late = wait(child, timeout_s)
            wall_s = time.monotonic() - sampler.t0
            totals = sampler.finish()
        requests = tracer.stop() if tracer else None
        oom, peak = p.oom_kills(), p.peak()
        method, locked = p.method, p.locked

    printed = engine.parse_output((partial / "stdout").read_text())
    errors = (partial / "stderr").read_text().strip()
    code = child.returncode
    status = "oom" if oom else "timeout" if late else "ok" if code == 0 and printed else "failed"
    result = {"key": job.key, **job.to_dict(), "command": command[1:], "status": status, "exit_code": code,
              "error": errors[-500:] if status != "ok" else "", "model_bytes": size, "budget_bytes": budget,
              "limit_bytes": limit, "pressure_method": method, "locked_bytes": locked, "peak_bytes": peak,
              "oom_kills": oom, "wall_s": wall_s, "skipped": skipped}  # fmt: skip
    result |= {f"total_{k}": v for k, v in totals.items() if k != "t_us"}
    result |= speeds(printed, job) if status == "ok" else {}
    block_rows = save_traces(partial, sampler, requests, model, trace_file, skipped)
    if requests is not None:
        result["trace_lost"], result["block_requeued_bytes"] = requests.lost, requests.requeued_bytes
    if block_rows is not None:
        result["block_reads"], result["block_bytes"] = block_rows.num_rows, int(table.column(block_rows, "bytes").sum())
    if status == "ok":
        result["decode_read_bytes"] = decode_bytes(result, sampler.counters_table(), block_rows)
    (partial / "run.json").write_text(json.dumps(result, indent=1) + "\n")
    shutil.rmtree(out, ignore_errors=True)
    partial.replace(out)
    return Outcome(result, skipped)


def speeds(printed: dict, job: Job) -> dict:
    out = {k: printed[k] for k in ("hash", "load_s", "prompt_s", "decode_s")}
    out["decode_tokens_per_s"] = job.tokens / printed["decode_s"] if printed["decode_s"] else None
    prompt_s = printed.get("prompt_again_s", printed["prompt_s"])  # the first one loads
    out["prompt_tokens_per_s"] = printed["n_prompt"] / prompt_s if prompt_s else None
    out["first_token_s"] = printed["load_s"] + printed["prompt_s"]
    out["metrics"] = printed.get("metrics")
    return out


def save_traces(
    out: Path, sampler: Sampler, requests: blkparse.Requests | None, model: Model, trace_file: Path, skipped: list[str]
) -> pa.Table | None:
    table.save(sampler.counters_table(), out / "counters.parquet")
    table.save(sampler.residency_table(), out / "residency.parquet")
    if trace_file.is_file():
        try:
            read = reader.read(trace_file)
            table.save(read, out / "reader.parquet")
            table.save(mapping.pieces(read, model.where), out / "reader_pieces.parquet")
        except ValueError as error:
            skipped.append(str(error))
        trace_file.unlink()
    if requests is None or model.extents is None or model.disk is None:
        return None
    rows = mapping.block_table(requests.reads, sampler.t0, model.extents, model.disk.name)
    table.save(rows, out / "block.parquet")
    table.save(mapping.pieces(rows, model.where), out / "block_pieces.parquet")
    return rows


def decode_bytes(result: dict, counters: pa.Table, block_rows: pa.Table | None) -> float:
    """Read in the last decode_s of the run, while tokens were generated; between samples without a block trace."""
    start_us = (result["wall_s"] - result["decode_s"]) * 1e6
    if block_rows is not None and not result.get("trace_lost"):
        return float(table.column(block_rows, "bytes")[table.column(block_rows, "t_us") >= start_us].sum())
    if "read_bytes" not in counters.column_names:
        return float("nan")
    t, read = (np.nan_to_num(table.column(counters, n).astype(float)) for n in ("t_us", "read_bytes"))
    return float(read[-1] - np.interp(start_us, t, read))
