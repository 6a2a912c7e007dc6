"""`superllama cluster serve`: an application of Ray Serve on a cluster that runs, until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._errors import Error

if TYPE_CHECKING:
    from .bundles import Bundle

PORT = 8000  # Ray Serve's own
NO_CLUSTER = (
    "no Ray cluster is running here ({why}): `ray start --head` on the first machine, `ray start --address=HOST:6379` "
    "on each other one, then this again"
)


def add_to(commands: Any) -> None:
    """Put `cluster` among the subcommands."""
    cluster = commands.add_parser("cluster", help="a model over several machines, with Ray (the extra ray)")
    actions = cluster.add_subparsers(dest="action", required=True, metavar="ACTION")
    serve = actions.add_parser("serve", help="serve a model with groups of nodes, until Ctrl-C")
    serve.add_argument("model", help="a GGUF file, by the same path on every node, or hf:ORG/REPO[:QUANT]")
    serve.add_argument("--nodes", metavar="N", type=int, required=True, help="of one group")
    serve.add_argument("--mem-per-node", metavar="SIZE", required=True, help="that layers may take there, e.g. 8GiB")
    serve.add_argument("--cpus-per-node", metavar="N", type=float, default=1, help="that compute there (default: 1)")
    serve.add_argument("--replicas", metavar="N", type=int, help="groups (default: 1)")
    serve.add_argument("--min-replicas", metavar="N", type=int, help="as few groups, where there are few requests")
    serve.add_argument("--max-replicas", metavar="N", type=int, help="as many, where there are many")
    serve.add_argument("--model-dir", metavar="DIR", help="of nodes: weights in its files are not sent to them")
    serve.add_argument("--rpc-secret", metavar="FILE", type=Path, help="what nodes share (default: made up)")
    serve.add_argument("--api-key", metavar="KEY", default=os.environ.get("LLAMA_API_KEY"), help="or LLAMA_API_KEY")
    serve.add_argument("--host", default="127.0.0.1", help="where clients are listened to (default: %(default)s)")
    serve.add_argument("--port", type=int, default=PORT, help="(default: %(default)s)")
    serve.add_argument("--name", default="superllama", help="of the application (default: %(default)s)")
    serve.add_argument("--address", default="auto", help="of the Ray cluster (default: that of this machine)")
    serve.add_argument("-c", "--ctx-size", metavar="N", type=int, help="tokens of context, of all slots")
    serve.add_argument("-np", "--parallel", metavar="N", type=int, help="slots of a group (default: 4)")
    serve.epilog = "After -- come flags of superllama-server, for the engine of each group."


def without_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line of `cluster`, and the engine's flags that follow it. (What argparse makes of -- differs from one
    Python to the next.)"""
    at = words.index("--") if words[:1] == ["cluster"] and "--" in words else len(words)
    return list(words[:at]), list(words[at + 1 :])


def run(args: argparse.Namespace, flags: Sequence[str]) -> int:
    """Do it; `flags` are the engine's. Raises: Error."""
    from .. import ray as ours
    from .bundles import equal_bundles, read_bundles

    bundles = equal_bundles(args.nodes, args.mem_per_node, args.cpus_per_node)
    options = {"n_ctx": args.ctx_size, "n_parallel": args.parallel}
    app = ours.deployment(
        args.model,
        bundles=bundles,
        replicas=args.replicas,
        autoscaling=_autoscaling(args.min_replicas, args.max_replicas, args.parallel or 4),
        secret=_secret(args.rpc_secret),
        model_dir=args.model_dir,
        api_key=args.api_key,
        words=flags,
        **{name: value for name, value in options.items() if value is not None},
    )
    import ray
    from ray import serve

    try:
        ray.init(address=args.address, logging_level="WARNING", log_to_driver=False, ignore_reinit_error=True)
    except ConnectionError as e:
        raise Error(NO_CLUSTER.format(why=str(e).split(".")[0])) from e
    if lack := missing(read_bundles(bundles), ray.nodes()):
        print(f"superllama: the cluster has no room for a group yet: {lack}; waiting for it", file=sys.stderr)
    serve.start(http_options={"host": args.host, "port": args.port})
    try:
        serve.run(app, name=args.name, route_prefix="/")
        print(f"serving {args.model} at http://{args.host}:{args.port}/v1; Ctrl-C ends it", flush=True)
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        stop.wait()
    except KeyboardInterrupt:
        print("ending: what runs may finish", flush=True)
    except RuntimeError as e:
        raise Error(f"Ray cannot serve it: {e}") from e
    finally:
        serve.delete(args.name)
    return 0


def _autoscaling(least: int | None, most: int | None, n_parallel: int) -> dict[str, int] | None:
    if least is None and most is None:
        return None
    if most is None:
        raise Error("--min-replicas goes with --max-replicas")
    if not 0 <= (least or 0) <= most:
        raise Error(f"--min-replicas {least} --max-replicas {most}: from few to many")
    return {
        "min_replicas": 1 if least is None else least,
        "max_replicas": most,
        "target_ongoing_requests": n_parallel,
    }


def _secret(path: Path | None) -> str | None:
    return None if path is None else path.read_text().strip()


def missing(bundles: Sequence[Bundle], nodes: Sequence[Mapping[str, Any]]) -> str:
    """What the nodes of a cluster, as ray.nodes() tells of them, lack for one group with each bundle on a node of its
    own; "" where there is room."""
    from .._look.amounts import memory

    alive = [node for node in nodes if node.get("Alive")]
    free = sorted(alive, key=lambda node: -float(node["Resources"].get("memory", 0)))
    for bundle in sorted(bundles, key=lambda one: -one.memory):
        fit = [node for node in free if _fits(bundle, node["Resources"])]
        if not fit:
            wanted = f"{len(bundles)} nodes with {memory(bundle.memory)} and {bundle.cpus:g} CPUs are needed"
            return f"{wanted}, and there are {', '.join(map(_told, alive)) or 'none'}"
        free.remove(fit[-1])  # the smallest that will do
    return ""


def _fits(bundle: Bundle, resources: Mapping[str, float]) -> bool:
    return all(resources.get(name, 0) >= wanted for name, wanted in bundle.resources().items())


def _told(node: Mapping[str, Any]) -> str:
    resources = node["Resources"]
    from .._look.amounts import memory

    has = memory(resources.get("memory", 0))
    return f"{node.get('NodeManagerAddress', '?')} ({has}, {resources.get('CPU', 0):g} CPUs)"
