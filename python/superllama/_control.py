"""The control plane of a server that runs: what its memory is for, budgets, pauses, over HTTP."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any

from ._errors import Error

STATUS = "/superllama"
TIMEOUT_S = 60


def status(url: str, key: str | None = None) -> dict[str, Any]:
    """What GET /superllama says. Raises: Error with the server's reason, or why there is none."""
    return _ask(url, STATUS, key, None)


def set_budget(url: str, key: str | None, budgets: Mapping[str, Any]) -> dict[str, Any]:
    """Change budgets; the status afterwards. Raises: Error as status()."""
    return _ask(url, f"{STATUS}/budget", key, dict(budgets))


def pause(url: str, key: str | None = None) -> dict[str, Any]:
    """Give the model's memory back until resume(); the status afterwards. Raises: Error as status()."""
    return _ask(url, f"{STATUS}/pause", key, {})


def resume(url: str, key: str | None = None) -> dict[str, Any]:
    """Load the model again; the status afterwards. Raises: Error as status()."""
    return _ask(url, f"{STATUS}/resume", key, {})


def drain(url: str, key: str | None = None) -> dict[str, Any]:
    """Take no new requests until resume(); the status afterwards. Raises: Error as status()."""
    return _ask(url, f"{STATUS}/drain", key, {})


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
            why = "it is no server of superllama" if path == STATUS else f"it knows no {path}: it is an older one"
        if e.code == 401:
            why = "it wants a key: --api-key KEY, or LLAMA_API_KEY"
        raise Error(f"{url}: {why}") from e
    except (OSError, http.client.HTTPException, ValueError, TypeError) as e:  # the last two: no JSON, or no object
        raise Error(f"{url}: no server answers there ({getattr(e, 'reason', e)})") from e
