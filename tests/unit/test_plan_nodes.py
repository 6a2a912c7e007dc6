"""The plan of several machines: its file, its arithmetic with given rates, the command over it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import superllama
from superllama import _plan_spec, cli

MIB = 1 << 20
HEAD: dict[str, Any] = {"memory": "64MiB", "disk": "1GB/s", "compute": "10GB/s"}
NODE: dict[str, Any] = {"memory": "1GiB", "network": "1Gbit/s", "round_trip": "0.5ms"}


def spec(*nodes: dict[str, Any], **head: Any) -> dict[str, Any]:
    return {"head": HEAD | head, "node": [NODE | node for node in nodes]}


def test_a_file_says_what_machines_there_are(tmp_path: Path) -> None:
    file = tmp_path / "spec.toml"
    file.write_text("""
        [head]
        memory = "4GiB"
        disk = "2.5GB/s"
        [[node]]
        name = "attic"
        memory = "8GiB"
        budget = "6GiB"
        network = "10Gbit/s"
        round_trip = "200us"
        compute = 5e9
        model_dir = true
        [[node]]
        memory = 1073741824
        network = 125000000
        round_trip = 0.001
    """)
    found = _plan_spec.read_spec(file)
    assert found.head == _plan_spec.Head(4 << 30, 2.5e9, None)
    assert found.nodes[0] == _plan_spec.Node("attic", 8 << 30, 1.25e9, pytest.approx(2e-4), 6 << 30, None, 5e9, True)
    assert found.nodes[1] == _plan_spec.Node("node2", 1 << 30, 1.25e8, 1e-3)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"memory": "much"}, r"node node1: memory: .*much"),
        ({"memory": "50%"}, r"node node1: memory: '50%' is not a size"),
        ({"memory": True}, r"node node1: memory: .*True.* is not a size"),
        ({"memory": 0}, r"node node1: memory: .*a budget of 0 bytes"),
        ({"network": "1Gbit"}, r"node node1: network: '1Gbit' is not a rate above 0"),
        ({"network": -5}, r"node node1: network: -5 is not a rate above 0"),
        ({"network": "1.2.3GB/s"}, r"node node1: network: '1.2.3GB/s' is not a rate"),
        ({"network": float("nan")}, r"node node1: network: nan is not a rate"),
        ({"round_trip": "0ms"}, r"node node1: round_trip: '0ms' is not a time above 0"),
        ({"round_trip": False}, r"node node1: round_trip: False is not a time"),
        ({"model_dir": "yes"}, r"node node1: model_dir: 'yes' is neither true nor false"),
        ({"speed": 1}, r"node node1: speed: is no key of it: there are name, memory"),
        ({"name": "head"}, r"node head: name: is taken"),
    ],
)
def test_what_is_wrong_is_named(node: dict[str, Any], words: str) -> None:
    with pytest.raises(superllama.Error, match=words):
        _plan_spec.parse_spec(spec(node))


def test_what_is_missing_or_too_much_is_named() -> None:
    for key in ("memory", "network", "round_trip"):
        node = {k: v for k, v in NODE.items() if k != key}
        with pytest.raises(superllama.Error, match=f"node node1: {key}: is missing"):
            _plan_spec.parse_spec({"node": [node]})
    for top, words in (
        ({}, "node: 0 of them, a plan has 1 to 12"),
        ({"node": [NODE] * 13}, "node: 13 of them"),
        ({"node": NODE}, r"a table for each node"),
        ({"nodes": [NODE]}, r"nodes: there are"),
        ({"node": [NODE | {"name": "a"}] * 2}, "node a: name: is taken"),
        ({"head": 5, "node": [NODE]}, "head: is a table"),
        ({"head": {"memory": -1}, "node": [NODE]}, "head: memory: "),
    ):
        with pytest.raises(superllama.Error, match=words):
            _plan_spec.parse_spec(top)


def plan_of(path: Path, top: dict[str, Any], **kwargs: Any) -> superllama.NodesPlan:
    return superllama.plan_nodes(path, _plan_spec.parse_spec(top), n_ctx=256, n_ubatch=64, n_threads=1, **kwargs)


def test_all_layers_go_where_there_is_room(tiny_model: Path) -> None:
    found = plan_of(tiny_model, spec({"name": "a"}))
    assert set(found.placement) == {"a"} and len(found.placement) == found.n_layers
    head, a = found.shares
    assert (head.n_layers, head.streamed_bytes, a.n_layers) == (0, 0, found.n_layers)
    assert found.machine is None  # everything is in the file
    assert a.kv_bytes > 0 and a.weight_bytes > 0 and a.n_round_trips == 1
    assert a.weight_bytes + a.kv_bytes + a.compute_bytes <= a.budget_bytes
    assert a.budget_bytes == pytest.approx((1 << 30) * 0.85)  # the default of mem_pressure
    # with the file there, less than a message for each unit crosses
    assert a.load_model_dir_bytes < a.load_bytes and a.load_bytes > a.weight_bytes * 0.9


def test_a_token_takes_what_its_machines_take(tiny_model: Path) -> None:
    found = plan_of(tiny_model, spec({"name": "a"}))
    head, a = found.shares
    assert a.seconds_network == pytest.approx((a.sent_bytes + a.received_bytes) / 125e6 + a.n_round_trips * 5e-4)
    assert head.seconds_compute is not None and a.seconds_compute is not None and a.seconds_network is not None
    assert found.seconds_per_token == pytest.approx(head.seconds_compute + a.seconds_compute + a.seconds_network)
    assert found.tokens_per_s is not None and found.tokens_per_s <= found.bound_tokens_per_s
    slow = plan_of(tiny_model, spec({"name": "a", "round_trip": "20ms", "network": "50Mbit/s"}))
    assert slow.placement == found.placement
    assert slow.seconds_per_token is not None and slow.seconds_per_token > 0.02
    # a rate of its own
    fast = plan_of(tiny_model, spec({"name": "a", "compute": "100GB/s"}))
    assert fast.shares[1].seconds_compute == pytest.approx(a.seconds_compute / 10)


def test_more_memory_where_it_is_short_gives_more_layers(tiny_model: Path) -> None:
    whole = plan_of(tiny_model, spec({"name": "a"})).shares[1]
    half = whole.compute_bytes + (whole.weight_bytes + whole.kv_bytes) // 2
    found = plan_of(tiny_model, spec({"name": "a", "budget": half}))
    assert 0 < found.shares[1].n_layers < found.n_layers
    # the last layers are on the node
    assert found.placement == ("head",) * found.shares[0].n_layers + ("a",) * found.shares[1].n_layers
    more = {m.name: m for m in found.more}
    assert set(more) == {"head", "a"}
    assert more["a"].n_layers == found.n_layers and more["head"].n_layers == found.shares[1].n_layers
    assert more["a"].tokens_per_s is not None


def test_too_little_on_the_head_is_said(tiny_model: Path) -> None:
    found = plan_of(tiny_model, spec({"name": "a"}, memory="1MiB"))
    assert not found.works and found.tokens_per_s is None and found.head_least_bytes > MIB
    assert found.more[0].tokens_per_s is not None  # a GiB more


def test_the_command_and_its_json(tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "spec.toml"
    head = "".join(f"{k} = {json.dumps(v)}\n" for k, v in HEAD.items())
    node = "".join(f"{k} = {json.dumps(v)}\n" for k, v in NODE.items())
    file.write_text(f"[head]\n{head}[[node]]\nname = 'a'\n{node}")
    arguments = ["plan", str(tiny_model), "-c", "256", "-t", "1", "--nodes", str(file)]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "a token: " in text and "1 GiB more on a: " in text and "first load of a: " in text
    assert cli.main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [s["name"] for s in found["shares"]] == ["head", "a"]
    assert found["works"] and len(found["placement"]) == found["n_layers"]
    file.write_text("[[node]]\nmemory = 'x'\n")
    assert cli.main(arguments) != 0
    assert "node node1: memory" in capsys.readouterr().err


def test_a_notebook_shows_the_machines(tiny_model: Path) -> None:
    html = plan_of(tiny_model, spec({"name": "attic"}))._repr_html_()
    assert "attic" in html and "tokens/s" in html
