"""Server: the HTTP server as a process beside this one."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

import superllama


def post(url: str, body: Any, key: str) -> Any:
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60) as answer:
        return json.load(answer)


def test_a_server_answers_those_who_have_its_key(tiny_model: Path) -> None:
    with superllama.Server(tiny_model, n_threads=1, n_ctx=512, mem_budget="64MiB") as server:
        body = {"prompt": "the", "max_tokens": 4, "temperature": 0}
        answer = post(f"{server.url}/completions", body, server.api_key)
        assert answer["usage"]["completion_tokens"] <= 4
        with pytest.raises(urllib.error.HTTPError, match="401"):
            post(f"{server.url}/completions", body, "another")
        assert "listening" in server.log
        process = server._process
    assert server.closed and process.returncode == 0
    server.close()


def test_a_server_that_does_not_start_says_why(tiny_model: Path) -> None:
    with pytest.raises(superllama.ModelError, match="mem-budget"):
        superllama.Server(tiny_model, mem_budget="1MiB")
    with pytest.raises(TypeError, match="did you mean"):
        superllama.Server(tiny_model, mem_budgt="1MiB")  # type: ignore[call-arg]
