"""A model over several machines with Ray: an application of Ray Serve, for what no machine has the memory for alone.

    from ray import serve
    import superllama.ray

    node = {"CPU": 8, "memory": "24GiB"}
    serve.run(superllama.ray.deployment("/models/large.gguf", bundles=[node, node]))

Ray starts, places and watches the processes; layers go where there is memory, as on one machine. It is an extra:
pip install "superllama[ray]", on every node.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from ._errors import Error

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ._engine.options import EngineOptions

__all__ = ["deployment"]

SECRET_BYTES = (16, 4096)  # as of --rpc-secret
MOST_REQUESTS = 2  # of a group, for each that it computes at once: as many wait at the engine as run


def deployment(
    model: str | os.PathLike[str],
    *,
    bundles: Sequence[Mapping[str, Any]],
    replicas: int | None = None,
    autoscaling: Mapping[str, Any] | None = None,
    name: str | None = None,
    strategy: str = "STRICT_SPREAD",
    secret: str | None = None,
    model_dir: str | os.PathLike[str] | None = None,
    api_key: str | None = None,
    max_requests: int | None = None,
    drain_timeout: float = 600,
    words: Sequence[str] = (),
    **options: Unpack[EngineOptions],
) -> Any:
    """An application for serve.run(): groups of bundles, each of which serves the model, behind one HTTP address.

    `model` is a GGUF file, by the same path on every node where an engine may run, or hf:ORG/REPO[:QUANT].
    `bundles` are the nodes of a group, in Ray's form: [{"CPU": 8, "memory": "24GiB"}, ...]. The engine is in the first
    one, whose memory is its mem_budget; each other one has an RPC server, whose memory is the budget of that device.
    `replicas` is how many groups there are (1); or `autoscaling`, Ray Serve's autoscaling_config, such as
    {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 4}.
    `strategy` of the placement group: "STRICT_SPREAD" has every bundle on a node of its own.
    `secret` is what the parts of a group prove to each other that they know, 16 to 4096 bytes; made up without one.
    `model_dir` is a folder of GGUF files on the nodes of the RPC servers: what is in them is not sent.
    `api_key` is asked of clients; several are separated by commas.
    `max_requests` is how many a group has at once (twice n_parallel); others wait before it, which autoscaling sees.
    `drain_timeout` is how many seconds what runs may take when a group is to go.
    `words` are more flags of superllama-server; `options` those of superllama.Server.

    Raises: Error for what cannot be, or where Ray is not installed.
    """
    from ._cluster.bundles import check_options, check_strategy, read_bundles

    found = read_bundles(bundles)
    check_options(options, words)
    check_strategy(strategy)
    if replicas is not None and autoscaling is not None:
        raise Error("replicas or autoscaling, one of them: min_replicas and max_replicas say how many there are")
    if replicas is not None and replicas < 1:
        raise Error(f"replicas={replicas}: 1 is the least; autoscaling= with min_replicas=0 can have none for a while")
    key = secrets.token_urlsafe(32) if secret is None else secret
    least, most = SECRET_BYTES
    if not least <= len(key.encode()) <= most:
        raise Error(f"a secret has {least} to {most} bytes, and this one {len(key.encode())}")
    path = os.fspath(model)
    n_parallel = options.get("n_parallel") or 4
    _check_ray()
    from ._cluster.deployment import application

    return application(
        path,
        found,
        name=name or _name_of(path),
        replicas=1 if replicas is None else replicas,
        autoscaling=autoscaling,
        strategy=strategy,
        secret=key,
        model_dir=None if model_dir is None else os.fspath(model_dir),
        api_key=api_key,
        max_requests=max_requests or MOST_REQUESTS * n_parallel,
        drain_s=drain_timeout,
        options=options,
        words=tuple(words),
    )


def _name_of(model: str) -> str:
    """Of a deployment: the file, with what such names may hold."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", PurePath(model).name.removesuffix(".gguf")).strip("-") or "model"


def _check_ray() -> None:
    try:
        from ray import serve  # noqa: F401
    except ImportError as e:
        raise Error(f"superllama.ray needs Ray Serve ({e}): pip install 'superllama[ray]', on every node") from e
