"""Asking a server for what it does with its memory: where it is, which model of a router, and what is shown of that."""

from __future__ import annotations

import http.server
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from statuses import MIB, shown, status

from superllama import Error, _control, cli
from superllama._commands.program_flags import flags_of
from superllama._look.status import status_text
from superllama._top.sources import Server
from superllama._top.view import Picture

MEMBERS = [
    {"model": "small", "lease_bytes": 100 * MIB, "least_bytes": 90 * MIB, "full_bytes": 200 * MIB},
    {"model": "org/large:Q4_K_M", "lease_bytes": 0, "least_bytes": 300 * MIB, "full_bytes": 900 * MIB},
]


def router(*members: dict[str, Any]) -> dict[str, Any]:
    """As GET /superllama of a router answers."""
    leased = sum(member["lease_bytes"] for member in members)
    pool = {"total_bytes": 400 * MIB, "leased_bytes": leased, "members": list(members)}
    return {"version": "0.1.0", "upstream_build": "b1", "state": "ready", "router": True, "pool": pool}


class Asked(http.server.ThreadingHTTPServer):
    """A server that notes what it is asked, and answers as a router."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.asked: list[tuple[str, Any]] = []


class Answer(http.server.BaseHTTPRequestHandler):
    server: Asked

    def do_GET(self) -> None:
        self.do_POST()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.asked.append((self.path, json.loads(body) if body else None))
        nameless = self.command == "POST" and "model" not in json.loads(body) and "budget" not in self.path
        answer = {"error": {"message": "model name is missing from the request"}} if nameless else router(*MEMBERS)
        self.send_response(400 if nameless else 200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Asked]:
    with Asked() as found:
        threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield found
        found.shutdown()


def test_commands_ask_where_a_server_listens_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    (port,) = [flag for flag in flags_of("llama-server") if "--port" in flag.names]
    assert f"(default: {_control.PORT})" in port.about
    monkeypatch.delenv("LLAMA_ARG_PORT", raising=False)
    assert cli.parser().parse_args(["ps"]).url == f"http://127.0.0.1:{_control.PORT}"
    monkeypatch.setenv("LLAMA_ARG_PORT", "8123")
    assert cli.parser().parse_args(["budget", "1GiB"]).url == "http://127.0.0.1:8123"


def test_an_address_may_be_a_host_and_a_port(server: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    for url in (f"127.0.0.1:{server.server_port}", f"http://127.0.0.1:{server.server_port}/v1/"):
        assert cli.main(["ps", "--url", url]) == 0
    assert server.asked == [("/superllama", None)] * 2
    capsys.readouterr()


def test_one_model_of_a_router(server: Asked, capsys: pytest.CaptureFixture[str]) -> None:
    at = ["--url", f"127.0.0.1:{server.server_port}", "--model", "org/m:Q4"]
    for words in (["ps"], ["pause"], ["budget", "1GiB"]):
        assert cli.main([*words, *at]) == 0
    query = "?model=org%2Fm%3AQ4&autoload=false"  # who looks at a model does not load it
    assert server.asked == [
        (f"/superllama{query}", None),
        (f"/superllama/pause{query}", {"model": "org/m:Q4"}),
        (f"/superllama/budget{query}", {"mem_budget": "1GiB", "model": "org/m:Q4"}),
    ]
    assert cli.main(["drain", *at[:2]]) == 1
    assert "name one with --model NAME" in capsys.readouterr().err


def test_what_a_router_shows_of_its_models() -> None:
    assert status_text(router(*MEMBERS)).splitlines()[1:] == [
        "memory           100 MiB of 400 MiB [######------------------]",
        "small            100 MiB of 200 MiB [############------------] works from 90 MiB",
        "org/large:Q4_K_M gave its memory back",
    ]
    assert "none is loaded" in status_text(router())
    lines = shown(Picture("router", found=router(*MEMBERS)))
    assert "100 MiB of 400 MiB" in lines[1] and lines[3].startswith("small   ") and "works from 90 MiB" in lines[3]
    assert lines[4].startswith("org/large:Q4_K_M ") and max(map(len, lines)) <= 80
    assert "no model is loaded" in shown(Picture("router", found=router()))[1]


def test_keys_change_the_budget_of_a_routers_models_and_pause_none(server: Asked) -> None:
    source = Server(f"127.0.0.1:{server.server_port}", None)
    action = source.action("+", router(*MEMBERS))
    assert action is not None and action.said == "budget 440 MiB"
    action.work()
    assert server.asked == [("/superllama/budget", {"mem_budget": 440 * MIB})]
    with pytest.raises(Error, match="top --model NAME"):
        source.action("p", router(*MEMBERS))
    assert Server("host:1", None, "small").name == "small at host:1"


def test_a_single_server_is_shown_as_before() -> None:
    assert "layers   █░▣" in status_text(status())
