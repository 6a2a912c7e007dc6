"""The file of `superllama plan --nodes`: a head that serves a model, and nodes that lend memory over RPC."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ._errors import Error
from ._sizes import size_bytes

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

N_NODES_MAX = 12
_RATE = re.compile(r"([0-9.]+) ?([kMGT]?)(B|bit)/s")
_RATE_UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_TIME = re.compile(r"([0-9.]+) ?(us|ms|s)")
_TIME_UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_HEAD_KEYS = ("memory", "disk", "compute")
_NODE_KEYS = ("name", "memory", "budget", "disk", "network", "round_trip", "compute", "model_dir")


@dataclasses.dataclass(frozen=True)
class Head:
    """The machine that serves: it has the model file, and what is on no node."""

    memory_bytes: int = 0  # its budget; 0 = automatic, of what this machine has
    disk_bytes_per_s: float | None = None  # None: measured here
    compute_bytes_per_s: float | None = None  # of weights; None: measured here


@dataclasses.dataclass(frozen=True)
class Node:
    """A machine with a superllama-rpc-server."""

    name: str  # unlike the others'
    memory_bytes: int  # free there, before the model is loaded
    network_bytes_per_s: float  # between the head and it
    round_trip_s: float  # of the smallest message and its answer
    budget_bytes: int = 0  # as --vram-budget; 0 = automatic, of what is free
    disk_bytes_per_s: float | None = None  # for what it reads itself, with model_dir; None: as the head's
    compute_bytes_per_s: float | None = None  # of weights; None: as the head's
    model_dir: bool = False  # whether its server has the file (--model-dir)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a file of `superllama plan --nodes` says."""

    head: Head  # the machine that serves
    nodes: tuple[Node, ...]  # in the order of --rpc


def read_spec(path: str | os.PathLike[str]) -> Spec:
    """The machines that a TOML file describes: a table [head], and [[node]] for each node.

    Raises: Error that names the key and what it has to be; OSError where the file cannot be read.
    """
    try:
        top = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise Error(f"{path}: {e}") from e
    return parse_spec(top, str(path))


def parse_spec(top: Mapping[str, Any], where: str = "nodes") -> Spec:
    """The same of what such a file holds. Raises: Error."""
    for key in top:
        if key not in ("head", "node"):
            raise Error(f"{where}: {key}: there are [head] and [[node]]")
    head, nodes = top.get("head", {}), top.get("node", [])
    if not isinstance(head, dict):
        raise Error(f"{where}: head: is a table, [head]")
    if not isinstance(nodes, list) or not all(isinstance(node, dict) for node in nodes):
        raise Error(f"{where}: node: is a table for each node, [[node]]")
    if not 1 <= len(nodes) <= N_NODES_MAX:
        raise Error(f"{where}: node: {len(nodes)} of them, a plan has 1 to {N_NODES_MAX}")
    h = _Table(where, "head", head, _HEAD_KEYS)
    found = []
    for i, values in enumerate(nodes):
        name = str(values.get("name", f"node{i + 1}"))
        t = _Table(where, f"node {name}", values, _NODE_KEYS)
        found.append(
            Node(
                name=name,
                memory_bytes=t.size("memory"),
                network_bytes_per_s=t.rate("network"),
                round_trip_s=t.seconds("round_trip"),
                budget_bytes=t.size("budget", auto=True),
                disk_bytes_per_s=t.rate_or_none("disk"),
                compute_bytes_per_s=t.rate_or_none("compute"),
                model_dir=t.flag("model_dir"),
            )
        )
    names = [node.name for node in found]
    for name in names:
        if names.count(name) > 1 or name == "head":
            raise Error(f"{where}: node {name}: name: is taken, each node has one of its own")
    return Spec(
        Head(h.size("memory", auto=True), h.rate_or_none("disk"), h.rate_or_none("compute")),
        tuple(found),
    )


class _Table:
    """The keys of one machine."""

    def __init__(self, where: str, name: str, values: Mapping[str, Any], keys: tuple[str, ...]) -> None:
        self.where, self.name, self.values = where, name, values
        for key in values:
            if key not in keys:
                raise self.error(key, f"is no key of it: there are {', '.join(keys)}")

    def error(self, key: str, what: str) -> Error:
        return Error(f"{self.where}: {self.name}: {key}: {what}")

    def get(self, key: str, what: str) -> Any:
        if key not in self.values:
            raise self.error(key, f"is missing: {what}")
        return self.values[key]

    def size(self, key: str, auto: bool = False) -> int:
        if auto and self.values.get(key, "auto") == "auto":
            return 0
        what = 'a size, "8GiB" or bytes'
        value = self.get(key, what)
        try:
            n = size_bytes(value) if isinstance(value, int | str) and "%" not in str(value) else 0
        except ValueError as e:
            raise self.error(key, str(e)) from e
        if n <= 0:
            raise self.error(key, f"{value!r} is not {what}")
        return n

    def rate(self, key: str) -> float:
        what = 'a rate above 0, "1Gbit/s", "2GB/s" or bytes per second'
        return self._number(key, what, _RATE, lambda m: float(m[1]) * _RATE_UNITS[m[2]] / (8 if m[3] == "bit" else 1))

    def rate_or_none(self, key: str) -> float | None:
        return self.rate(key) if key in self.values else None

    def seconds(self, key: str) -> float:
        return self._number(
            key, 'a time above 0, "0.3ms", "200us" or seconds', _TIME, lambda m: float(m[1]) * _TIME_UNITS[m[2]]
        )

    def flag(self, key: str) -> bool:
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self.error(key, f"{value!r} is neither true nor false")
        return value

    def _number(self, key: str, what: str, pattern: re.Pattern[str], convert: Any) -> float:
        value = self.get(key, what)
        match = pattern.fullmatch(value) if isinstance(value, str) else None
        try:
            n = convert(match) if match else float(value) if isinstance(value, int | float) else 0.0
        except ValueError:  # digits with two points
            n = 0.0
        if isinstance(value, bool) or not 0 < n < 1e18:
            raise self.error(key, f"{value!r} is not {what}")
        return float(n)
