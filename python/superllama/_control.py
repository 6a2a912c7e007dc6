"""The control plane of a server that runs: what its memory is for, budgets, pauses, over HTTP.

Of a router, which serves several models, `model` names one; without it the answer is that of the router itself.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from ._errors import Error

STATUS = "/superllama"
TIMEOUT_S = 60
PORT = 9931  # where upstream's server listens unless it is told otherwise: `superllama-server --help` says it


def default_url() -> str:
    """Where a server listens that is started here without --port."""
    return f"http://127.0.0.1:{os.environ.get('LLAMA_ARG_PORT') or PORT}"


def status(url: str, key: str | None = None, model: str | None = None) -> dict[str, Any]:
    """What GET /superllama says. Raises: Error with the server's reason, or why there is none."""
    return _ask(url, STATUS, key, model, None)


def set_budget(url: str, key: str | None, budgets: Mapping[str, Any], model: str | None = None) -> dict[str, Any]:
    """Change budgets; the status afterwards. Raises: Error as status()."""
    return _ask(url, f"{STATUS}/budget", key, model, budgets)


def pause(url: str, key: str | None = None, model: str | None = None) -> dict[str, Any]:
    """Give the model's memory back until resume(); the status afterwards. Raises: Error as status()."""
    return _ask(url, f"{STATUS}/pause", key, model, {})


def resume(url: str, key: str | None = None, model: str | None = None) -> dict[str, Any]:
    """Load the model again; the status afterwards. Raises: Error as status()."""
    return _ask(url, f"{STATUS}/resume", key, model, {})


def drain(url: str, key: str | None = None, model: str | None = None) -> dict[str, Any]:
    """Take no new requests until resume(); the status afterwards. Raises: Error as status()."""
    return _ask(url, f"{STATUS}/drain", key, model, {})


def _ask(url: str, path: str, key: str | None, model: str | None, body: Mapping[str, Any] | None) -> dict[str, Any]:
    import http.client  # they take longer than most commands, of which each knows default_url()
    import urllib.error
    import urllib.parse
    import urllib.request

    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    address = (url if "://" in url else f"http://{url}").rstrip("/").removesuffix("/v1") + path
    named = {} if model is None else {"model": model}
    if named:  # a look loads no model
        address += "?" + urllib.parse.urlencode({**named, "autoload": "false"})
    try:
        data = None if body is None else json.dumps({**body, **named}).encode()
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
        if "model name is missing" in why:
            why = "it serves several models: name one with --model NAME"
        if e.code == 401:
            why = "it wants a key: --api-key KEY, or LLAMA_API_KEY"
        raise Error(f"{url}: {why}") from e
    except (OSError, http.client.HTTPException, ValueError, TypeError) as e:  # the last two: no JSON, or no object
        raise Error(f"{url}: no server answers there ({getattr(e, 'reason', e)})") from e
