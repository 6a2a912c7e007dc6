"""What a model would do on several machines: a head that serves it, and nodes that lend memory over RPC.

The library places the layers as a load would, on devices that have sizes only, and says what a token sends; rates of
disk, network and processor come from the file that describes the machines, or are measured here. Layers are computed
one after another, so a token takes the sum of what the machines take; on the head, reading and computing overlap.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ._errors import ModelError
from ._files import model_bytes
from ._memory import memory, n_physical_cores
from ._native import collected_errors, ffi, last_error, lib, reason
from ._params import ContextParams, ModelParams
from ._plan import Machine, Use, context_to_c, copied, expert_read_of, measure, model_to_c, question
from ._plan_spec import Node, Spec, read_spec
from ._sizes import size_bytes

MORE_BYTES = 1 << 30  # what one more of would give
N_LAYERS_MAX = 1024


@dataclasses.dataclass(frozen=True)
class Share:
    """What one machine would have, and take for one token. Bytes, unless the name says otherwise."""

    name: str  # "head", or the node's
    n_layers: int  # the output matrix counts as one
    first_layer: int | None  # None: none
    last_layer: int | None  # None: none
    budget_bytes: int  # of its memory, that is used
    weight_bytes: int  # resident weights
    kv_bytes: int  # of its layers
    compute_bytes: int  # buffers, and the projector on the head; on a node without layers, those for which it has none
    streamed_bytes: int  # read from disk for each token: of the head only
    sent_bytes: int  # to it, for each token, in a context that is full
    received_bytes: int  # from it, for each token
    n_round_trips: int  # that each token waits for
    seconds_compute: float | None  # of each token; None: the placement does not work
    seconds_disk: float | None  # of the head, meanwhile
    seconds_network: float | None  # bytes and round trips
    load_bytes: int  # that cross the network until a context is there, if its server has no files
    load_model_dir_bytes: int  # if it has the file (--model-dir)
    load_seconds: float  # of its first load, as model_dir says

    @property
    def seconds(self) -> float | None:
        """Of each token: on the head, reading and computing overlap. None: the placement does not work."""
        if self.seconds_compute is None or self.seconds_disk is None or self.seconds_network is None:
            return None
        return max(self.seconds_compute, self.seconds_disk) + self.seconds_network


@dataclasses.dataclass(frozen=True)
class More:
    """What one more GiB would give on one machine."""

    name: str  # "head", or the node's
    n_layers: int  # on nodes then
    tokens_per_s: float | None  # None: that does not work either
    faster: float | None  # than without it: 1.0 = no difference


@dataclasses.dataclass(frozen=True)
class NodesPlan:
    """What superllama.plan_nodes() found."""

    model: Path  # its file
    model_bytes: int  # of its file, or of all parts of it
    n_ctx: int  # tokens of context
    n_layers: int  # the output matrix counts as one
    placement: tuple[str, ...]  # of each layer: "head", or the node's name
    head_least_bytes: int  # the smallest budget of the head that works with this placement
    works: bool  # whether its budget is at least that
    shares: tuple[Share, ...]  # the head first
    seconds_per_token: float | None  # None: the head has too little memory
    tokens_per_s: float | None  # the same the other way round
    bound_tokens_per_s: float  # what no placement on these machines exceeds; see plan_nodes()
    more: tuple[More, ...]  # the head first
    machine: Machine | None  # what was measured here, for what the file does not say

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        found = dataclasses.asdict(self)
        found["model"] = str(self.model)
        return found

    def _repr_html_(self) -> str:
        """What a notebook shows: each machine with its layers, and the parts of a token's time."""
        from ._look.html import nodes_view

        return nodes_view(self.as_dict(), [s.seconds for s in self.shares])


# ---------------------------------------------------------------- the plan


def plan_nodes(
    path: str | os.PathLike[str],
    nodes: Spec | str | os.PathLike[str],
    params: ModelParams | None = None,
    context_params: ContextParams | None = None,
    *,
    mem_budget: int | str | None = None,
    n_ctx: int | None = None,
    n_ubatch: int | None = None,
    n_threads: int | None = None,
    repack: bool | None = None,
    use: Use = "generate",
    n_parallel: int | None = None,
    mmproj: str | os.PathLike[str] | None = None,
) -> NodesPlan:
    """What a model would do on the machines of `nodes` (a Spec, or the TOML file of one): which layers where, what is
    resident and what is read again, what a token takes by part, what the first load sends. No weights are loaded, and
    no machine is asked. `mem_budget` is the head's, before the file's; the rest is as in plan().

    The bound is what no placement exceeds: every weight of a token computed by the fastest machine, what fits in the
    memory of none read by the head's disk meanwhile, and one round trip of the fastest link if the head alone cannot
    hold everything.

    Raises: Error for a wrong file, ModelError if the model cannot be read or planned for, ValueError and
    pydantic.ValidationError for wrong values.
    """
    spec = nodes if isinstance(nodes, Spec) else read_spec(nodes)
    q = question(path, params, context_params, mem_budget, n_ctx, n_ubatch, n_threads, repack, use, n_parallel, mmproj)
    params, context = q.params, q.context
    asked = size_bytes(params.mem_budget) or spec.head.memory_bytes
    budget = asked or int(memory().host_available * params.mem_pressure)

    cases = [(spec.nodes, budget), (spec.nodes, budget + MORE_BYTES)]
    for i, node in enumerate(spec.nodes):
        # a budget that was named is raised with it
        more = dataclasses.replace(
            node,
            memory_bytes=node.memory_bytes + MORE_BYTES,
            budget_bytes=node.budget_bytes + MORE_BYTES if node.budget_bytes else 0,
        )
        cases.append(((*spec.nodes[:i], more, *spec.nodes[i + 1 :]), budget))
    found = library_plan_nodes(q.file, params, context, cases, q.at_once, q.n_outputs, q.n_projector)

    machine = None
    if spec.head.disk_bytes_per_s is None or spec.head.compute_bytes_per_s is None:
        machine, _ = measure(q.file, params.use_extra_bufts, context.n_threads or n_physical_cores())
    disk = spec.head.disk_bytes_per_s or (machine.read_bytes_per_s if machine else 0)
    cpu = spec.head.compute_bytes_per_s or (machine.cpu_bytes_per_s if machine else 0)

    first = found[0]
    shares = shares_of(first, spec, disk, cpu)
    seconds = seconds_of(shares)
    more_of = []
    for name, case in zip(("head", *(node.name for node in spec.nodes)), found[1:], strict=True):
        then = seconds_of(shares_of(case, spec, disk, cpu))
        more_of.append(
            More(
                name,
                sum(s.n_layers for s in case.shares),
                1 / then if then else None,
                seconds / then if seconds and then else None,
            )
        )
    names = [node.name for node in spec.nodes]
    return NodesPlan(
        model=q.file,
        model_bytes=model_bytes(q.file),
        n_ctx=q.n_ctx,
        n_layers=len(first.layers),
        placement=tuple(names[layer.node] if layer.node >= 0 else "head" for layer in first.layers),
        head_least_bytes=first.host.mem_least_bytes,
        works=first.host.works,
        shares=shares,
        seconds_per_token=seconds,
        tokens_per_s=1 / seconds if seconds else None,
        bound_tokens_per_s=1 / bound_of(first, spec, disk, cpu),
        more=tuple(more_of),
        machine=machine,
    )


def library_plan_nodes(
    path: Path,
    params: ModelParams,
    context: ContextParams,
    cases: list[tuple[tuple[Node, ...], int]],
    at_once: bool = False,
    n_outputs: int = 0,
    n_projector: int = 0,
) -> list[SimpleNamespace]:
    """For each case of nodes and the head's budget: `host`, a copy of the C struct superllama_plan; `shares`, of
    superllama_node_share for each node; `layers`, of superllama_plan_layer, the output matrix last. Raises: ModelError.
    """
    owned: list[Any] = []
    n_nodes = len(cases[0][0])
    c = context_to_c(context, owned, at_once, n_outputs)
    m = model_to_c(params, owned, n_projector)
    nodes = ffi.new("struct superllama_plan_node[]", len(cases) * n_nodes)
    for i, node in enumerate(node for case, _ in cases for node in case):
        nodes[i].free_bytes, nodes[i].budget_bytes = node.memory_bytes, node.budget_bytes
        nodes[i].round_trip_s, nodes[i].bytes_per_s = node.round_trip_s, node.network_bytes_per_s
    host = ffi.new("struct superllama_plan[]", len(cases))
    shares = ffi.new("struct superllama_node_share[]", len(cases) * n_nodes)
    layers = ffi.new("struct superllama_plan_layer[]", len(cases) * N_LAYERS_MAX)
    budgets = [budget for _, budget in cases]
    with collected_errors() as errors:
        n_layers = lib.superllama_plan_nodes(
            os.fsencode(path), m, c, nodes, n_nodes, budgets, len(cases), host, shares, layers, N_LAYERS_MAX
        )
    if n_layers < 0:
        raise ModelError(f"cannot plan for {path}: {reason(errors, last_error())}")
    return [
        SimpleNamespace(
            host=copied("superllama_plan", host[i]),
            shares=[copied("superllama_node_share", shares[i * n_nodes + k]) for k in range(n_nodes)],
            layers=[copied("superllama_plan_layer", layers[i * N_LAYERS_MAX + k]) for k in range(n_layers)],
        )
        for i in range(len(cases))
    ]


# ---------------------------------------------------------------- arithmetic


def shares_of(case: SimpleNamespace, spec: Spec, disk: float, cpu: float) -> tuple[Share, ...]:
    """The head and the nodes, with what each takes for a token. `disk` and `cpu` are rates of the head."""
    h = case.host
    read = h.streamed_bytes + expert_read_of(h)
    where = [layer.node for layer in case.layers]
    head = Share(
        name="head",
        n_layers=where.count(-1),
        **_ends(where, -1),
        budget_bytes=h.mem_budget_bytes,
        weight_bytes=h.fixed_bytes + h.pinned_bytes + h.ring_bytes + h.expert_pool_bytes,
        kv_bytes=h.kv_bytes,
        compute_bytes=h.compute_bytes + h.projector_bytes,
        streamed_bytes=read if h.works else 0,
        sent_bytes=0,
        received_bytes=0,
        n_round_trips=0,
        seconds_compute=_of_token(case, -1) / cpu if h.works else None,
        seconds_disk=read / disk if h.works else None,
        seconds_network=0.0 if h.works else None,
        load_bytes=0,
        load_model_dir_bytes=0,
        load_seconds=0.0,
    )
    found = [head]
    for i, (node, s) in enumerate(zip(spec.nodes, case.shares, strict=True)):
        network = (s.sent_bytes + s.received_bytes) / node.network_bytes_per_s + s.n_waits * node.round_trip_s
        if node.model_dir:
            rate = node.disk_bytes_per_s or disk
            load = s.load_hashed_bytes / node.network_bytes_per_s + s.n_load_asks * node.round_trip_s
            load = max(load + s.weight_bytes / rate, s.weight_bytes / disk)
        else:
            load = max(s.load_bytes / node.network_bytes_per_s, s.weight_bytes / disk)
        found.append(
            Share(
                name=node.name,
                n_layers=s.n_layers,
                **_ends(where, i),
                budget_bytes=s.budget_bytes,
                weight_bytes=s.weight_bytes,
                kv_bytes=s.kv_bytes,
                compute_bytes=s.compute_bytes,
                streamed_bytes=0,
                sent_bytes=s.sent_bytes,
                received_bytes=s.received_bytes,
                n_round_trips=s.n_waits,
                seconds_compute=_of_token(case, i) / (node.compute_bytes_per_s or cpu) if h.works else None,
                seconds_disk=0.0 if h.works else None,
                seconds_network=network if h.works else None,
                load_bytes=s.load_bytes,
                load_model_dir_bytes=s.load_hashed_bytes,
                load_seconds=load,
            )
        )
    return tuple(found)


def _of_token(case: SimpleNamespace, node: int) -> int:
    """Bytes of weights that one token uses there."""
    return sum(layer.token_bytes for layer in case.layers if layer.node == node)


def _ends(where: list[int], node: int) -> dict[str, int | None]:
    mine = [il for il, n in enumerate(where) if n == node]
    return {"first_layer": mine[0] if mine else None, "last_layer": mine[-1] if mine else None}


def seconds_of(shares: tuple[Share, ...]) -> float | None:
    """Of one token: the machines one after another."""
    total = 0.0
    for s in shares:
        if s.seconds is None:
            return None
        total += s.seconds
    return total


def bound_of(case: SimpleNamespace, spec: Spec, disk: float, cpu: float) -> float:
    """Seconds that a token takes at least, wherever the layers are."""
    h = case.host
    of_token = sum(layer.token_bytes for layer in case.layers)
    need = h.mem_full_bytes + sum(s.weight_bytes + s.kv_bytes + s.compute_bytes for s in case.shares)
    room = h.mem_budget_bytes + sum(s.budget_bytes for s in case.shares)
    # of experts, a token reads only those that it uses
    all_weights = sum(layer.weight_bytes for layer in case.layers)
    read = max(0, need - room) * min(1.0, of_token / max(1, all_weights))
    fastest = max(cpu, *(node.compute_bytes_per_s or cpu for node in spec.nodes))
    trip = min(node.round_trip_s for node in spec.nodes) if need > h.mem_budget_bytes else 0.0
    return float(max(of_token / fastest, read / disk)) + trip
