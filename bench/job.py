"""One run of the study, as data: what is run, in which memory, with which settings."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

HEADROOM = 64 << 20  # beside the weights: program, vocabulary, KV cache, compute buffers


@dataclass(frozen=True)
class Job:
    model: str  # path
    scenario: str  # baseline, 50percent, 100percent, 700mb: memory for the weights
    engine: str
    tokens: int = 20  # generated
    prompt_tokens: int = 16
    swappiness: int | None = None  # None = as found
    read_ahead_kb: int | None = None  # None = as found
    threads: int = 2
    flags: tuple[str, ...] = ()  # added to the engine's
    pressure: str = "auto"
    block_tracer: str = "auto"  # auto, tracefs, blktrace, none
    headroom: int = HEADROOM
    repeat: int = 0

    @property
    def key(self) -> str:
        """Names the run's folder: readable, and different for every difference."""
        settings = json.dumps(asdict(self) | {"model": Path(self.model).name}, sort_keys=True)
        swap = "" if self.swappiness is None else f"-sw{self.swappiness}"
        ahead = "" if self.read_ahead_kb is None else f"-ra{self.read_ahead_kb}"
        name = f"{Path(self.model).stem}-{self.scenario}-{self.engine}{swap}{ahead}-{self.repeat}"
        return f"{name}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"

    def budget(self, model_bytes: int) -> int | None:
        """Bytes of memory for the weights; None = no limit."""
        return scenario_bytes(self.scenario, model_bytes)

    def to_dict(self) -> dict:
        return asdict(self) | {"flags": list(self.flags)}


def scenario_bytes(scenario: str, model_bytes: int) -> int | None:
    if scenario == "baseline":
        return None
    if match := re.fullmatch(r"(\d+)percent", scenario):
        return model_bytes * int(match[1]) // 100
    if match := re.fullmatch(r"(\d+)mb", scenario, re.IGNORECASE):
        return int(match[1]) * 10**6
    raise ValueError(
        f"scenario {scenario!r}: baseline, a share of the model such as 50percent, or a size such as 700mb"
    )
