"""The metrics line as a pydantic model, and the JSON schema of the line that is made from it.

    python -m superllama._metrics        write metrics.schema.json

Names and order are a contract; additions go at the end.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=0)]
Megabytes = Annotated[float, Field(ge=0, description="10^6 bytes")]
Pressure = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0)]

PREFIX = b"[METRICS] "  # of lines that --metrics writes into a program's log
SCHEMA_FILE = Path(__file__).with_name("metrics.schema.json")


class ExpertCounts(BaseModel):
    """The experts of a model: a row for each layer that has some, in each a number for each expert."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: list[Count] = Field(description="which layer each row is of")
    uses: list[list[Count]] = Field(description="tokens that a router sent to it, since the load")
    misses: list[list[Count]] = Field(description="ubatches that wanted it while it was not in memory")
    tier: list[list[Literal[0, 1, 2]]] = Field(description="0: in host memory, 1: read when chosen, 2: on a device")


class SequenceMetrics(BaseModel):
    """What one sequence has computed and holds: a slot of a server. Tokens only grow, whatever is removed of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sequence: Count = Field(description="its number")
    prompt_tokens: Count = Field(description="computed, of prompts; a shared one counts for the lowest sequence")
    generated_tokens: Count = Field(description="generated")
    kv_tokens: Count = Field(description="its length after its last ubatch: the last position that it held, and 1")
    kv_pages_cpu: Count = Field(
        description="KV pages with data in memory, a short time ago; one that several sequences use counts for each"
    )
    kv_pages_disk: Count = Field(description="KV pages with data on disk only, at that time")
    kv_bytes: Count = Field(description="of its KV in memory, at that time, where cells take it on use; else 0")


class DeviceMetrics(BaseModel):
    """What the model and its contexts have on one device, in bytes. What moved only grows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str = Field(description="its name")
    bytes: Count = Field(description="weights, KV and compute buffers, now")
    budget_bytes: Count = Field(description="that they may have there")
    bytes_up: Count = Field(description="weights and KV that moved to it")
    bytes_down: Count = Field(description="KV that moved from it; weights are in the file")


class Metrics(BaseModel):
    """What one context has done. Counters only grow; a field of a feature that is off is 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    timestamp: datetime = Field(description="UTC, milliseconds")
    token: Count = Field(description="tokens processed: prompt and generated")
    prompt_tokens: Count = Field(description="computed, of prompts")
    generated_tokens: Count = Field(description="generated")
    gpu_layers_active: Count = Field(description="layers on devices now")
    cpu_layers_active: Count = Field(description="layers in host memory now, whole")
    layers_evicted: Count = Field(description="blocks that left memory or a device")
    layers_loaded: Count = Field(description="blocks that were read, or moved to a device")
    kv_pages_gpu: Count = Field(description="KV pages on devices now; always 0")
    kv_pages_cpu: Count = Field(description="KV pages with data in memory now")
    kv_pages_evicted: Count = Field(description="KV pages that left memory")
    kv_pages_prefetched: Count = Field(description="KV pages that were read ahead")
    vram_used_mb: Megabytes = Field(description="of devices, by whomever")
    vram_total_mb: Megabytes = Field(description="of devices")
    ram_used_mb: Megabytes = Field(description="resident memory of this process")
    gpu_memory_pressure: Pressure = Field(description="used part of the fullest device")
    cpu_memory_pressure: Pressure = Field(description="used part of the memory that this process may use")
    tokens_per_sec: Rate = Field(description="generated, since the line before")
    avg_tokens_per_sec: Rate = Field(description="generated, over the time spent generating")
    prefetch_pending: Count = Field(description="reads that are under way or wait for a thread")
    prefetch_completed: Count = Field(description="reads that were done ahead")
    prefetch_failed: Count = Field(description="reads that failed")
    event: Literal["periodic", "layer_evicted", "layer_loaded", "kv_page_evicted", "kv_page_restored", "final"] = Field(
        description="what the line was written for"
    )
    disk_layers_active: Count = Field(description="layers of which something is read when it is needed, now")
    kv_pages_disk: Count = Field(description="KV pages with data on disk only, now")
    weight_bytes_resident: Count = Field(description="weights of layers in memory now")
    weight_bytes_read: Count = Field(description="read from disk")
    kv_bytes_read: Count = Field(description="read of spilled KV pages")
    kv_bytes_written: Count = Field(description="written to spill KV pages")
    stall_ms: Rate = Field(description="computing waited for reads")
    expert_hits: Count = Field(description="experts that were in memory when a router chose them")
    expert_misses: Count = Field(description="experts that were not")
    mem_budget_bytes: Count = Field(description="budget of the host now; 0 = no dynamic layers")
    mem_peak_bytes: Count = Field(description="the most that was resident of this process")
    metrics_dropped: Count = Field(description="lines that a slow or full disk could not take")
    vram_own_bytes: Count = Field(description="on devices, of the model and its contexts")
    vram_budget_bytes: Count = Field(description="that they may have there, over all devices")
    move_ms: Rate = Field(description="spent moving layers to and from devices")
    expert_guesses: Count = Field(description="experts read before the router had chosen them")
    expert_guesses_used: Count = Field(description="those of them that it chose")
    memory_by_tag: dict[str, Count] = Field(description="bytes in memory now, of what lies in the budget")
    threads: Count = Field(description="threads that computed the last graph on the host")
    core_wait_ms: Rate = Field(description="threads of the process were ready and had no core, while graphs ran")
    throttled_ms: Rate = Field(description="its control groups held it back for their quota of CPU time")
    expert_device_hits: Count = Field(
        description="experts that were on the device of their layer when they were chosen"
    )
    expert_device_misses: Count = Field(description="those that were not there")
    expert_host_computed: Count = Field(description="of these, those that the host computed")
    weight_bytes_ahead: Count = Field(
        description="weights of the host that devices had for large batches before it was their turn"
    )
    expert_device_guesses: Count = Field(
        description="experts sent to the device of their layer before the router had chosen them"
    )
    expert_device_guesses_used: Count = Field(description="those of them that it chose")
    experts: ExpertCounts | None = Field(
        description="each expert; in a file's last line and in one a minute before it, null in others"
    )
    sequences: list[SequenceMetrics] = Field(description="those that have done something, by number")
    devices: list[DeviceMetrics] = Field(description="that layers can go to; none without dynamic layers")


def metrics_of(context: Any) -> Metrics:
    """The metrics of a native context, which nobody frees meanwhile. Raises: ContextError."""
    from ._errors import ContextError
    from ._native import ffi, last_error, lib

    size = 4096
    while True:
        buffer = ffi.new("char[]", size)
        n = lib.superllama_metrics_json(context, buffer, size)
        if n < 0:
            raise ContextError(f"no metrics: {last_error()}")
        if n < size:
            return Metrics.model_validate_json(bytes(ffi.buffer(buffer, n)))
        size = n + 1


def schema() -> dict[str, Any]:
    """The JSON schema of the line, draft 2020-12."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": "superllama-metrics"}
    return {**head, **Metrics.model_json_schema()}


def schema_text() -> str:
    """What metrics.schema.json contains."""
    return json.dumps(schema(), indent=2) + "\n"


if __name__ == "__main__":
    SCHEMA_FILE.write_text(schema_text())
