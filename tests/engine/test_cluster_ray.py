"""Groups as replicas of Ray Serve, on a cluster of raylets of this machine, of which some are killed."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rpc_devices import NO_GPU, free_port
from serving import http_server, until

import superllama.ray

ray = pytest.importorskip("ray", reason="Ray is not installed (the extra ray)")
serve = pytest.importorskip("ray.serve", reason="Ray Serve is not installed (the extra ray)")
cluster_utils = pytest.importorskip("ray.cluster_utils", reason="this Ray has no clusters for tests")

MEMORY = 90 << 20  # of a bundle; the model has 93.8 MiB
STORE = 80 << 20  # the least that an object store of Ray takes
ENGINE, PART = {"CPU": 1, "memory": MEMORY, "engines": 1}, {"CPU": 1, "memory": MEMORY, "parts": 1}
OPTIONS: dict[str, Any] = {"n_ctx": 512, "n_parallel": 2, "flags": {"no_warmup": True, "repack": False}}
PROMPT = "The capital of France is Paris. The capital of Italy is"
KEY = "the key of these tests"


class Nodes:
    """A head with the engines, and nodes for parts; an application that is deployed on them."""

    def __init__(self) -> None:
        self.port = free_port()
        head = {"num_cpus": 2, "memory": 2 * MEMORY, "resources": {"engines": 2}, "include_dashboard": False}
        self.cluster = cluster_utils.Cluster(
            initialize_head=True, head_node_args={**head, "object_store_memory": STORE}
        )
        self.parts = [self.add(), self.add()]
        ray.init(address=self.cluster.address, logging_level="WARNING", log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": self.port})

    def add(self) -> Any:
        """A node with room for one part."""
        return self.cluster.add_node(num_cpus=1, memory=MEMORY, object_store_memory=STORE, resources={"parts": 1})

    def kill(self, node: Any) -> None:
        self.cluster.remove_node(node, allow_graceful=False)
        self.parts.remove(node)

    @contextlib.contextmanager
    def serving(self, model: Path, **arguments: Any) -> Iterator[None]:
        app = superllama.ray.deployment(
            model, bundles=[ENGINE, PART], name="m", api_key=KEY, drain_timeout=5, **arguments, **OPTIONS
        )
        serve.run(app, name="app", route_prefix="/")
        try:
            yield
        finally:
            serve.delete("app")

    def ask(self, path: str, body: Any = None, key: str = KEY, **headers: str) -> Any:
        """An open answer."""
        data = None if body is None else json.dumps(body).encode()
        headers |= {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, headers)
        return urllib.request.urlopen(request, timeout=300)

    def get(self, path: str, body: Any = None, **headers: str) -> Any:
        with self.ask(path, body, **headers) as answer:
            return json.load(answer)

    def tokens(self, n: int = 16, prompt: str = PROMPT, **headers: str) -> list[int]:
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "return_tokens": True}
        return list(self.get("/completion", body, **headers)["tokens"])

    def state_is(self, state: str) -> Callable[[], bool]:
        return lambda: self.get("/superllama")["state"] == state

    def devices(self) -> list[str]:
        layers = self.get("/superllama")["engine"]["layers"]
        return [layer["device"] for layer in layers if layer["tier"] == "device"]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**NO_GPU, "RAY_USAGE_STATS_ENABLED": "0"}.items():
            patch.setenv(name, value)
        made = Nodes()
        try:
            yield made
        finally:
            serve.shutdown()
            ray.shutdown()
            made.cluster.shutdown()


def test_one_group(nodes: Nodes, demo_model: Path, tmp_path: Path) -> None:
    """Of two nodes: tokens as of one process with the same placement; streams, keys, health. Then its nodes go away."""
    assert demo_model.stat().st_size > MEMORY
    flags = ["-c", 512, "-np", 2, "--kv-unified", "--async-prefetch", "--no-repack"]
    with nodes.serving(demo_model):
        found, where = nodes.tokens(), nodes.devices()
        assert where
        before = nodes.get("/superllama")
        # ------------------------------------------------ clients
        with pytest.raises(urllib.error.HTTPError, match="401"):
            nodes.ask("/v1/models", key="another")
        with pytest.raises(urllib.error.HTTPError, match="404"):
            nodes.ask("/superllama/budget", {"mem_budget": "1GiB"})
        with pytest.raises(urllib.error.HTTPError, match="400"):
            nodes.ask("/v1/chat/completions", {"messages": "no list"})
        body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "stream": True}
        with nodes.ask("/v1/chat/completions", body) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            events = [line for line in answer.read().decode().splitlines() if line]
        assert len(events) >= 6 and events[-1] == "data: [DONE]"
        assert nodes.get("/v1/models")["data"]
        generated = engine_of(nodes)["metrics"]["generated_tokens"]
        body = {"prompt": PROMPT, "n_predict": 400, "ignore_eos": True, "stream": True}
        with nodes.ask("/completion", body) as answer:
            assert answer.readline().startswith(b"data: {")
        until(lambda: engine_of(nodes)["requests_in_flight"] == 0)  # its client has left
        assert engine_of(nodes)["metrics"]["generated_tokens"] < generated + 400
        until(lambda: [group.get("state") for group in nodes.get("/health")["groups"]] == ["ready"])
        assert nodes.get("/health")["status"] == "ok"

        # ------------------------------------------------ a node is killed in the middle of a stream
        with nodes.ask("/completion", body) as answer:
            for _ in range(3):
                assert answer.readline().startswith(b"data: {")
                assert answer.readline() == b"\n"
            nodes.kill(part_of(nodes))
            rest = answer.read().decode()
        assert "a node of this model's group went away while it answered" in rest
        assert nodes.tokens() == found
        until(nodes.state_is("ready"))
        assert nodes.tokens() == found
        until(lambda: nodes.devices() == where)

        # ------------------------------------------------ that one too: none is left
        nodes.kill(part_of(nodes))
        until(nodes.state_is("degraded"))
        assert nodes.tokens() == found
        assert nodes.devices() == []
        until(lambda: nodes.get("/health")["status"] == "degraded")

        # ------------------------------------------------ a node comes
        nodes.parts.append(nodes.add())
        until(nodes.state_is("ready"))
        assert nodes.tokens() == found
        until(lambda: nodes.devices() == where)
        after = nodes.get("/superllama")
        assert after["pid"] == before["pid"]  # the engine is the one that it was
        assert after["parts"][0]["restarts"] == 2

    from superllama._cluster.part import RpcServer

    budgets = ["--mem-budget", MEMORY, "--vram-budget", MEMORY]
    with (
        RpcServer("127.0.0.1", 1, "a secret of 16 bytes") as server,
        (tmp_path / "secret").open("w") as secret,
    ):
        secret.write("a secret of 16 bytes")
        secret.flush()
        rpc = ["--rpc-secret", secret.name, "--rpc", server.endpoint]
        with http_server(demo_model, tmp_path / "log", *rpc, *flags, *budgets) as single:
            assert single.complete(PROMPT, n_predict=16, return_tokens=True)["tokens"] == found
            layers = single.request("/superllama")[1]["layers"]
    assert [layer["device"] for layer in layers if layer["tier"] == "device"] == where


def engine_of(nodes: Nodes) -> Any:
    return nodes.get("/superllama")["engine"]


def part_of(nodes: Nodes) -> Any:
    """The node with the part of the one group that there is."""
    busy = [
        node["NodeID"]
        for node in ray.nodes()
        if node["Alive"] and "parts" in node["Resources"] and not available(node["NodeID"]).get("parts")
    ]
    return next(node for node in nodes.parts if node.node_id in busy)


def available(node_id: str) -> dict[str, float]:
    return dict(ray._private.state.available_resources_per_node().get(node_id, {}))


def test_two_groups_under_load(nodes: Nodes, demo_model: Path) -> None:
    """Both answer; those of one conversation are answered by the same group."""
    while len(nodes.parts) < 2:
        nodes.parts.append(nodes.add())
    with nodes.serving(demo_model, replicas=2):
        until(lambda: [group.get("state") for group in nodes.get("/health")["groups"]] == ["ready", "ready"])
        prompts = [f"{PROMPT} number {i}" for i in range(8)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            first = list(pool.map(lambda prompt: nodes.tokens(24, prompt), prompts))
        assert all(first)

        def cached(name: str) -> int:
            body = {"prompt": f"{name}. " + PROMPT, "max_tokens": 1, "temperature": 0}
            answer = nodes.get("/v1/completions", body, **{"x-session-id": name})
            return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

        names = ["One", "Another", "The third", "Fourth", "This is five", "Six of them", "And seven", "Eight"]
        assert max(cached(name) for name in names) <= 2  # nobody knows them yet, but for how all prompts begin
        for name in names:
            cached(name)
            assert cached(name) > 8  # where it was before
        until(lambda: min(group.get("answered", 0) for group in nodes.get("/health")["groups"]) > 4)  # both
