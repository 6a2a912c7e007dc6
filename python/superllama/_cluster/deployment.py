"""A group as a replica of Ray Serve: the engine in the first bundle of a placement group, a part in each other one.

Clients talk to Ray's proxy, that to a front, which asks the replica of the conversation. Importing this imports Ray.
"""

# Ray may be absent where types are checked, and everything of it is Any there
# mypy: allow-untyped-decorators, allow-untyped-calls

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from .bundles import Bundle
from .exchange import Call, Head
from .group import Group, error_answer
from .part import RpcServer
from .router import SessionRouter
from .sessions import GROUPS, session_of

FACTS_S = 1.0  # between two looks at what a group is doing
HEALTH_S = 5.0
STARTS = 3  # of a group that cannot start, before its reason is told
HEAD = "node:__internal_head__"  # a resource of that node: where Ray itself ends, no other one takes the front along
FRONT_REQUESTS = 4096  # that one front has open at once
# of the engine; what changes its memory is the group's, and what is of one server says nothing of several
NOT_FOR_CLIENTS = ("/superllama", "/slots", "/lora-adapters", "/props", "/metrics")

logger = logging.getLogger("superllama.cluster")


# ---------------------------------------------------------------- parts, in the bundles of a placement group


class Part:
    """An actor in a bundle, with its RPC server."""

    def __init__(self, threads: int, secret: str, model_dir: str | None) -> None:
        self._threads, self._secret, self._model_dir = threads, secret, model_dir
        self._server: RpcServer | None = None

    def start(self, port: int) -> str:
        """Start the server, instead of one that ended; its endpoint, on the address by which Ray knows this node."""
        if self._server is not None:
            port = port or int(self._server.endpoint.rpartition(":")[2])
            self._server.close()
            self._server = None
        host = ray.util.get_node_ip_address()
        self._server = RpcServer(host, self._threads, self._secret, port=port, model_dir=self._model_dir)
        return self._server.endpoint

    def ended(self) -> str:
        """Waits until the server has ended; why."""
        assert self._server is not None
        return self._server.wait() or ""

    def where(self) -> dict[str, Any]:
        """The node and the process of the server."""
        assert self._server is not None
        return {"node": ray.get_runtime_context().get_node_id(), "pid": self._server.pid}


class Actors:
    """The parts of one placement group."""

    def __init__(self, bundles: Sequence[Bundle], secret: str, model_dir: str | None) -> None:
        self._bundles, self._secret, self._model_dir = bundles[1:], secret, model_dir
        self._placement_group = get_current_placement_group()
        self._actors: dict[int, Any] = {}
        self._ports: dict[int, int] = {}

    async def start(self, i: int) -> str:
        """See Parts."""
        endpoint = None
        if (actor := self._actors.get(i)) is not None:
            try:
                endpoint = await actor.start.remote(self._ports.get(i, 0))
            except ray.exceptions.RayActorError:  # with its node, or alone
                del self._actors[i]
        if endpoint is None:
            self._actors[i] = self._new(i)
            endpoint = await self._actors[i].start.remote(self._ports.get(i, 0))
        self._ports[i] = int(endpoint.rpartition(":")[2])
        return str(endpoint)

    async def ended(self, i: int) -> str:
        """See Parts."""
        try:
            return str(await self._actors[i].ended.remote())
        except ray.exceptions.RayActorError as e:
            return f"its actor is gone, or its node: {str(e).splitlines()[0]}"

    async def close(self) -> None:
        """See Parts."""
        for actor in self._actors.values():
            with contextlib.suppress(Exception):  # it is gone already
                ray.kill(actor)
        self._actors.clear()

    def _new(self, i: int) -> Any:
        bundle = self._bundles[i]
        strategy = PlacementGroupSchedulingStrategy(
            placement_group=self._placement_group, placement_group_bundle_index=i + 1
        )
        actor = ray.remote(Part).options(
            num_cpus=bundle.cpus,
            num_gpus=bundle.gpus,
            memory=bundle.memory,
            resources=dict(bundle.others),
            max_concurrency=4,  # ended() waits, while others ask
            scheduling_strategy=strategy,
        )
        return actor.remote(bundle.threads, self._secret, self._model_dir)


# ---------------------------------------------------------------- a replica


class GroupReplica:
    """A group, for Ray Serve."""

    async def __init__(  # type: ignore[misc] # Ray Serve awaits it
        self,
        model: str,
        bundles: Sequence[Bundle],
        secret: str,
        model_dir: str | None,
        options: Mapping[str, Any],
        words: Sequence[str],
    ) -> None:
        for handler in logging.getLogger("ray.serve").handlers:  # to the replica's log, as Ray's own words
            logger.addHandler(handler)
        self._group = Group(bundles, model, secret, Actors(bundles, secret, model_dir), options, words)
        await self._group.start()

    async def answer(self, call: Call) -> AsyncIterator[Head | bytes]:
        """See Group.answer()."""
        async with contextlib.aclosing(self._group.answer(call)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                yield piece

    async def status(self) -> dict[str, Any]:
        """See Group.status()."""
        return await self._group.status()

    def check_health(self) -> None:
        """Asked by Ray Serve, which makes the group anew where this raises."""
        self._group.check()

    def record_routing_stats(self) -> dict[str, Any]:
        """Asked by Ray Serve, for the router."""
        return self._group.facts()

    async def __del__(self) -> None:
        await self._group.close()


# ---------------------------------------------------------------- the front


class Front:
    """HTTP for all groups of a model."""

    def __init__(self, groups: Any, api_key: str | None) -> None:
        self._groups, self._api_key = groups, api_key

    async def __call__(self, request: Request) -> Response:
        """Any request of a client."""
        path = request.url.path.removeprefix(request.scope.get("root_path", "")) or "/"
        if path in ("/health", "/v1/health"):
            return await self._health()
        if not self._may(request):
            return _refusal(401, "the key is missing, or another one: Authorization: Bearer KEY")
        if path == "/superllama" and request.method == "GET":
            return JSONResponse(await self._groups.status.remote())
        if path.startswith(NOT_FOR_CLIENTS):
            return _refusal(404, f"{path} is of one server, and this is a cluster; GET /superllama says what it does")
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response(status_code=499)
        headers = {name.lower(): value for name, value in request.headers.items()}
        target = path + (f"?{request.url.query}" if request.url.query else "")
        return await self._passed_on(Call(request.method, target, headers, body, session_of(headers, body)))

    def _may(self, request: Request) -> bool:
        if self._api_key is None:
            return True
        given = request.headers.get("authorization", "").removeprefix("Bearer ") or request.headers.get("x-api-key", "")
        return any(hmac.compare_digest(given.encode(), key.encode()) for key in self._api_key.split(","))

    async def _passed_on(self, call: Call) -> Response:
        pieces = self._groups.options(stream=True).answer.remote(call)
        try:
            head = await anext(pieces)
        except Exception as e:  # of the replica, or of its node
            logger.warning("a request failed: %s", e)
            return _refusal(502, _reason(e))
        return StreamingResponse(_rest(pieces, head), head.status, dict(head.headers))

    async def _health(self) -> Response:
        if not GROUPS:  # the router knows them once it was asked for one
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._groups.status.remote(), HEALTH_S)
        groups = [dict(group) for group in GROUPS]
        states = [group.get("state", "ready") for group in groups]
        state = "loading" if not groups else "ok" if all(one == "ready" for one in states) else "degraded"
        serves = any(one in ("ready", "degraded", "recovering") for one in states)
        return JSONResponse({"status": state, "groups": groups}, 200 if serves else 503)


async def _rest(pieces: Any, head: Head) -> AsyncIterator[bytes]:
    """The body of an answer; a failure in the middle is its last event."""
    try:
        async for piece in pieces:
            yield piece
    except Exception as e:
        logger.warning("an answer ended in the middle: %s", e)
        if not head.headers.get("content-type", "").startswith("text/event-stream"):
            raise
        yield b"data: " + error_answer(502, _reason(e))[1] + b"\n\n"
    finally:
        with contextlib.suppress(Exception):  # where the client went away, the engine is to hear it
            pieces.cancel()


def _reason(error: Exception) -> str:
    """What an exception of another process says, without the path that it came by."""
    if isinstance(error, ray.exceptions.RayActorError):
        return "the node of this model's engine went away, and its group is made again; send the request again"
    cause = getattr(error, "cause", None) or error
    lines = [line for line in str(cause).splitlines() if line.strip()]
    return lines[-1].strip() if lines else repr(cause)


def _refusal(status: int, text: str) -> Response:
    return Response(error_answer(status, text)[1], status, media_type="application/json")


# ---------------------------------------------------------------- an application


def application(
    model: str,
    bundles: Sequence[Bundle],
    *,
    name: str,
    replicas: int | None,
    autoscaling: Mapping[str, Any] | None,
    strategy: str,
    secret: str,
    model_dir: str | None,
    api_key: str | None,
    max_requests: int,
    drain_s: float,
    options: Mapping[str, Any],
    words: Sequence[str],
) -> Any:
    """What serve.run() takes. Arguments are checked already."""
    engine = bundles[0]
    scale: dict[str, Any] = {"num_replicas": replicas} if autoscaling is None else {"autoscaling_config": autoscaling}
    groups = serve.deployment(
        name=name,
        ray_actor_options={
            "num_cpus": engine.cpus,
            "num_gpus": engine.gpus,
            "memory": engine.memory,
            "resources": dict(engine.others),
        },
        placement_group_bundles=[bundle.resources() for bundle in bundles],
        placement_group_strategy=strategy,
        max_ongoing_requests=max_requests,
        graceful_shutdown_timeout_s=drain_s,
        health_check_period_s=HEALTH_S,
        max_constructor_retry_count=STARTS,
        request_router_config=RequestRouterConfig(
            request_router_class=SessionRouter, request_routing_stats_period_s=FACTS_S
        ),
        **scale,
    )(GroupReplica)
    front = serve.deployment(
        name=f"{name}-front",
        ray_actor_options={"num_cpus": 0, "resources": {HEAD: 0.001}},
        max_ongoing_requests=FRONT_REQUESTS,
        graceful_shutdown_timeout_s=drain_s,
    )(Front)
    bound = groups.bind(model, tuple(bundles), secret, model_dir, dict(options), tuple(words))
    return front.bind(bound, api_key)
