"""What a server or a metrics file would say of a model, made up; and what a picture of it looks like."""

from __future__ import annotations

import io
import json
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from superllama._metrics import Metrics

MIB = 1 << 20
START = datetime(2026, 11, 21, 3, 37, tzinfo=timezone.utc)


def metrics(second: float = 0, **changes: object) -> dict[str, Any]:
    values: dict[str, Any] = dict.fromkeys(Metrics.model_fields, 0)
    at = (START + timedelta(seconds=second)).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    values |= {"timestamp": at, "event": "periodic", "memory_by_tag": {"kv": 0}, "experts": None}
    values |= {"sequences": [], "devices": []}
    values["mem_budget_bytes"] = 150 * MIB
    return values | changes


def line(second: int, **changes: object) -> str:
    """Of a metrics file, with a token for every second."""
    return json.dumps(metrics(second, token=second, **changes)) + "\n"


def append(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def layers(*tiers: str, share: float = 0) -> list[dict[str, Any]]:
    size = 2 * MIB
    resident = {"host": size, "device": 0, "disk": int(share * size)}
    return [{"index": i, "tier": tier, "bytes": size, "bytes_resident": resident[tier]} for i, tier in enumerate(tiers)]


def status(**changes: object) -> dict[str, Any]:
    """As GET /superllama answers."""
    found = {"version": "0.1.0", "upstream_build": "b1", "dynamic_layers": True, "memory_used_bytes": 0}
    return found | {"metrics": metrics(), "layers": layers("host", "disk", "device")} | changes


def shown(picture: RenderableType, width: int = 80, height: int | None = None, encoding: str = "utf-8") -> list[str]:
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    Console(file=out, width=width, color_system=None).print(picture, height=height)
    out.seek(0)
    return out.read().splitlines()
