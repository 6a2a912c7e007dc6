"""The control plane of a server that runs: what its memory is for, and budgets, over HTTP."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from ._errors import Error

TIMEOUT_S = 60


def status(url: str, key: str | None = None) -> dict[str, Any]:
    """What GET /superllama says. Raises: Error with the server's reason, or why there is none."""
    return _ask(url, "/superllama", key, None)


def set_budget(url: str, key: str | None, budgets: Mapping[str, Any]) -> dict[str, Any]:
    """Change budgets; the status afterwards. Raises: Error as status()."""
    return _ask(url, "/superllama/budget", key, dict(budgets))


def _ask(url: str, path: str, key: str | None, body: dict[str, Any] | None) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    address = url.rstrip("/").removesuffix("/v1") + path
    try:
        data = None if body is None else json.dumps(body).encode()
        with urllib.request.urlopen(urllib.request.Request(address, data, headers), timeout=TIMEOUT_S) as answer:
            return dict(json.load(answer))
    except urllib.error.HTTPError as e:
        text = e.read().decode("utf-8", "replace")
        try:
            why = json.loads(text)["error"]["message"]
        except (ValueError, KeyError, TypeError):
            why = f"{e.code} {e.reason}"
        if e.code == 404:
            why = "it is no server of superllama"
        if e.code == 401:
            why = "it wants a key: --api-key KEY, or LLAMA_API_KEY"
        raise Error(f"{url}: {why}") from e
    except (urllib.error.URLError, OSError, ValueError) as e:
        raise Error(f"{url}: no server answers there ({getattr(e, 'reason', e)})") from e
