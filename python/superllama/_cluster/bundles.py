"""What the bundles of a group have, and what follows from it: budgets, threads, options of the engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import Error
from .._sizes import size_bytes

LEAST_BYTES = 64 << 20  # of a bundle: an engine of a small model takes as much
MOST_DEVICES = 16  # that a model can be spread over: SUPERLLAMA_MAX_DEVICES
STRATEGIES = ("STRICT_SPREAD", "SPREAD", "PACK", "STRICT_PACK")
# what a bundle says, or a group has to know, is no option of its engine: the name -> what to do instead
TAKEN = {
    "mem_budget": "the memory of the first bundle is the budget of the host",
    "vram_budget": "the memory of each other bundle is the budget of its device",
    "dynamic_layers": "layers of a group are always dynamic: that is how they come back from a node that is lost",
    "rpc": "the other bundles are its RPC servers",
    "rpc_secret": "deployment(secret=) is what the parts share",
    "host": "Ray's proxy is what clients talk to",
    "port": "Ray's proxy is what clients talk to",
    "api_key": "deployment(api_key=) is asked of clients",
    "api_key_file": "deployment(api_key=) is asked of clients",
    "models_preset": "a group serves one model",
    "sleep_idle_seconds": "a group keeps its model; autoscaling= takes away groups that nobody needs",
    "idle_release": "a group keeps its model; autoscaling= takes away groups that nobody needs",
}


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Resources of one node. `others` are those that only Ray knows."""

    cpus: float
    memory: int
    gpus: float = 0
    others: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def resources(self) -> dict[str, float]:
        """As Ray writes them."""
        gpus = {"GPU": self.gpus} if self.gpus else {}
        return {"CPU": self.cpus, "memory": float(self.memory), **gpus, **self.others}

    @property
    def threads(self) -> int:
        """That compute there."""
        return max(1, math.floor(self.cpus))

    @property
    def devices(self) -> int:
        """That its RPC server offers: its cards, or else the processor."""
        return max(1, math.ceil(self.gpus))

    @property
    def device_budgets(self) -> list[int | str]:
        """One for each device. Memory of a card is no resource of Ray: it is filled as far as it has some."""
        return ["auto"] * self.devices if self.gpus else [self.memory]


def read_bundles(given: Sequence[Mapping[str, Any]]) -> tuple[Bundle, ...]:
    """Bundles of the form that Ray has, {"CPU": 4, "memory": "8GiB"}: the engine's first, then those of the parts.

    Raises: Error that says which one cannot be, why, and what can.
    """
    if isinstance(given, Mapping | str) or not given:
        raise Error('bundles is a list with one entry for each node, such as [{"CPU": 4, "memory": "8GiB"}, ...]')
    found = tuple(_bundle(i, one) for i, one in enumerate(given))
    n_devices = sum(part.devices for part in found[1:]) + math.ceil(found[0].gpus)
    if n_devices > MOST_DEVICES:
        raise Error(f"{n_devices} devices in {len(found)} bundles: a model is spread over {MOST_DEVICES} at most")
    return found


def _bundle(i: int, given: Mapping[str, Any]) -> Bundle:
    if not isinstance(given, Mapping):
        raise Error(f'bundle {i} is {given!r}, and has to be like {{"CPU": 4, "memory": "8GiB"}}')
    if "memory" not in given:
        raise Error(f'bundle {i} has no "memory": it is what the layers there may take, such as "8GiB"')
    memory = _memory(i, given["memory"])
    numbers = {name: _number(i, name, value) for name, value in given.items() if name != "memory"}
    cpus = numbers.pop("CPU", 1.0)
    if cpus == 0:
        raise Error(f'bundle {i} has "CPU": 0: somebody has to compute the layers there; 1 is the least')
    return Bundle(cpus, memory, numbers.pop("GPU", 0.0), numbers)


def _memory(i: int, value: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) and ("%" in value or value == "auto"):
        raise Error(f"bundle {i} has memory {value!r}: Ray wants to know how much that is; a size, such as 8GiB")
    try:
        found = size_bytes(value)
    except (ValueError, TypeError) as e:
        raise Error(f"bundle {i} has memory {value!r}: {e}") from e
    if found < LEAST_BYTES:
        raise Error(f"bundle {i} has {found} bytes of memory: {LEAST_BYTES >> 20} MiB is the least that is of use")
    return found


def _number(i: int, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise Error(f'bundle {i} has "{name}": {value!r}; a number from 0 on')
    return float(value)


def equal_bundles(nodes: int, memory: int | str, cpus: float = 1) -> list[dict[str, Any]]:
    """Those of `superllama cluster serve --nodes N --mem-per-node SIZE`. Raises: Error as read_bundles()."""
    if nodes < 1:
        raise Error(f"{nodes} nodes: one is the least, the engine's")
    return [{"CPU": cpus, "memory": memory} for _ in range(nodes)]


def check_strategy(strategy: str) -> str:
    """Raises: Error for one that Ray does not have."""
    if strategy not in STRATEGIES:
        raise Error(f"strategy {strategy!r}: one of {', '.join(STRATEGIES)}")
    return strategy


def check_options(options: Mapping[str, Any], words: Sequence[str] = ()) -> None:
    """Raises: Error for an option of the engine, or a flag, that the group decides, with what decides it."""
    flags = [word.partition("=")[0] for word in words if word.startswith("--")]
    for name in [*options, *(options.get("flags") or {}), *flags]:
        own = name.removeprefix("--").replace("-", "_")
        if own in TAKEN:
            raise Error(f"{name}: not in a group; {TAKEN[own]}")


def vram_budgets(bundles: Sequence[Bundle], present: Sequence[bool]) -> list[int | str]:
    """What --vram-budget says: for each device of each part its bundle's memory, nothing for those that are away, and
    for cards of the engine's own node all that they have. `present` is as long as there are parts."""
    found: list[int | str] = []
    for part, here in zip(bundles[1:], present, strict=True):
        found += part.device_budgets if here else [0] * part.devices
    return found + ["auto"] * math.ceil(bundles[0].gpus)


def engine_options(bundles: Sequence[Bundle], options: Mapping[str, Any], present: Sequence[bool]) -> dict[str, Any]:
    """Options of the engine, with what the bundles say. `present` is as long as there are parts."""
    found: dict[str, Any] = {"n_threads": bundles[0].threads, **options}
    found |= {"mem_budget": bundles[0].memory, "dynamic_layers": True}
    if budgets := vram_budgets(bundles, present):
        found["vram_budget"] = budgets
    return found
