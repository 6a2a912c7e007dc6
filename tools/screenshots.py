"""Pictures of the documentation, taken of what they show: docs/images/top.svg, experts.png.

python tools/screenshots.py            both; two minutes
python tools/screenshots.py top        a server with the demo model, whose budget becomes smaller
python tools/screenshots.py experts    a random mixture of experts of which not all fit in memory; needs chromium
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

from rich.console import Console, RenderableType

sys.path.insert(0, str(Path(__file__).parents[1]))

import superllama
from superllama import _control
from superllama._report.file import read_metrics
from superllama._report.page import report
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


def photograph(page: str, path: Path, width: int, height: int, dark: bool = False) -> None:
    """As a browser shows it."""
    if dark:
        page = page.replace("@media screen and (prefers-color-scheme: dark)", "@media all")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "page.html").write_text(page, encoding="utf-8")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=2"]
        where = [f"--user-data-dir={folder}/chromium", f"--window-size={width},{height}", f"--screenshot={path}"]
        subprocess.run(["chromium", *flags, *where, f"{folder}/page.html"], check=True, capture_output=True)


def experts(folder: Path = IMAGES, dark: bool = False) -> None:
    """The map of a report, after some hundred tokens of a model with the routing of real ones."""
    import gguf
    from bench import make_model

    spec = make_model.Spec(kind="moe", n_layer=24, n_embd=512, n_expert=64, n_expert_used=6, n_ff=128)
    with tempfile.TemporaryDirectory() as made:
        path, lines = Path(made) / "moe.gguf", Path(made) / "run.jsonl"
        make_model.make_model(path, superllama.demo_model(), spec)
        plan = superllama.plan(path, n_ctx=1024)
        of_experts = sum(int(t.n_bytes) for t in gguf.GGUFReader(path).tensors if "_exps." in t.name)
        budget = max(plan.mem_least_bytes, plan.mem_full_bytes - int(0.6 * of_experts))
        model = superllama.Model(path, mem_budget=budget, async_prefetch=True)
        with model, superllama.Context(model, n_ctx=1024, metrics_file=lines) as ctx:
            for _ in ctx.generate("Once upon a time", max_tokens=400, ignore_eos=True, seed=1):
                pass
        page = report(read_metrics(lines))
    head, body = page.split("<body>")
    section = re.search(r'<section class="heat">.*?</section>', body, re.DOTALL)
    assert section is not None
    style = "<style>body { padding: 1rem; } section { margin: 0; }</style>"
    photograph(f"{head}{style}<body>{section[0]}</body></html>", folder / "experts.png", 760, 285, dark)


if __name__ == "__main__":
    for name in sys.argv[1:] or ["top", "experts"]:
        {"top": top, "experts": experts}[name]()
