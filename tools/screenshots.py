"""Pictures of the documentation, taken of what they show: docs/images/top.svg.

python tools/screenshots.py        a server with the demo model, whose budget becomes smaller; two minutes
"""

from __future__ import annotations

import io
import json
import re
import threading
import time
import urllib.request
from pathlib import Path

from rich.console import Console, RenderableType

import superllama
from superllama import _control
from superllama._top.loop import INTERVAL_S, Session
from superllama._top.sources import Server

IMAGES = Path(__file__).parents[1] / "docs" / "images"
COLUMNS, LINES = 80, 24
LARGE, SMALL = "180MiB", "112MiB"  # everything in memory; most of the layers on disk
LARGE_S, SMALL_S = 40, 50


def save(picture: RenderableType, path: Path, title: str) -> None:
    """As a terminal shows it, and with no address in it: web fonts and the like of the template are left out."""
    from rich._export_format import CONSOLE_SVG_FORMAT

    console = Console(
        record=True, width=COLUMNS, height=LINES, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(picture, height=LINES)
    template = re.sub(r"@font-face \{\{.*?\}\}\s*|<!--.*?-->\s*", "", CONSOLE_SVG_FORMAT, flags=re.DOTALL)
    path.parent.mkdir(exist_ok=True)
    svg = console.export_svg(title=title, code_format=template, unique_id=path.stem)
    path.write_text("\n".join(line.rstrip() for line in svg.splitlines()) + "\n")


def ask(url: str, key: str, prompt: str) -> None:
    """One long answer of a server."""
    body = json.dumps({"prompt": prompt, "max_tokens": 400, "ignore_eos": True}).encode()
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    urllib.request.urlopen(urllib.request.Request(f"{url}/completions", body, headers)).close()


def top() -> None:
    """A server that computes with its model in memory first, and then streams it."""
    ended = threading.Event()
    flags = {"n_parallel": 1, "n_ctx": 1024, "mem_budget": LARGE, "async_prefetch": True, "cache_ram": 0}
    with superllama.Server(superllama.demo_model(), **flags) as server:

        def load() -> None:
            while not ended.is_set():
                ask(server.url, server.api_key, "Once upon a time")

        client = threading.Thread(target=load)
        client.start()
        session = Session(Server(server.url.removesuffix("/v1"), server.api_key))
        for second in range(LARGE_S + SMALL_S):
            if second == LARGE_S:
                _control.set_budget(server.url, server.api_key, {"mem_budget": SMALL})
            session.watch.take(session.watch.source.read())
            time.sleep(INTERVAL_S)
        save(session.picture(), IMAGES / "top.svg", "superllama top")
        ended.set()
        client.join()


if __name__ == "__main__":
    top()
