"""Pictures of the documentation, taken of what they show: docs/images.

python tools/screenshots.py            all of them; six minutes
python tools/screenshots.py top        a server with the demo model, whose budget becomes smaller
python tools/screenshots.py page       a server with a random mixture of experts, seen in a browser; needs chromium
python tools/screenshots.py report     a run of that model, whose budget becomes larger; the same
python tools/screenshots.py experts    the map in such a report; the same
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
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console, RenderableType

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import chromium

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
PAGE_S = 125  # the page shows two minutes


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


def mixture(folder: Path) -> tuple[Path, int, int, int]:
    """A random model with the routing of real ones; the least and the full budget for it, and bytes of its experts."""
    import gguf
    from bench import make_model

    spec = make_model.Spec(kind="moe", n_layer=24, n_embd=512, n_expert=64, n_expert_used=6, n_ff=128)
    path = folder / "moe.gguf"
    make_model.make_model(path, superllama.demo_model(), spec)
    plan = superllama.plan(path, n_ctx=1024)
    of_experts = sum(int(t.n_bytes) for t in gguf.GGUFReader(path).tensors if "_exps." in t.name)
    return path, plan.mem_least_bytes, plan.mem_full_bytes, of_experts


def page(dark: bool = True) -> None:
    """The page of a server, after two minutes of work."""
    ended = threading.Event()
    with tempfile.TemporaryDirectory() as made:
        path, least, full, of_experts = mixture(Path(made))
        budget = max(least, full - int(0.85 * of_experts))
        flags = {"n_parallel": 1, "n_ctx": 1024, "mem_budget": budget, "async_prefetch": True}
        with superllama.Server(path, **flags) as server:

            def load() -> None:
                while not ended.is_set():
                    ask(server.url, server.api_key, "Once upon a time")

            client = threading.Thread(target=load)
            client.start()
            try:
                with chromium.open_page(browser(), Path(made) / "chromium") as shown:
                    address = f"{server.url.removesuffix('/v1')}/superllama/ui"
                    shown.open(address)
                    shown.run(f"sessionStorage.setItem('superllama-key', {json.dumps(server.api_key)})")
                    shown.open(address)
                    shown.look(1000, 700, dark)
                    time.sleep(PAGE_S)
                    shown.picture(IMAGES / "page.png", whole=False)
            finally:
                ended.set()
                client.join()


def browser() -> str:
    """The one that takes pictures of pages."""
    found = chromium.find()
    if found is None:
        sys.exit("there is no Chromium here to take the picture with")
    return found


def generated(path: Path, lines: Path, budgets: Iterable[int]) -> str:
    """The report of some hundred tokens for each budget."""
    first, *others = budgets
    model = superllama.Model(path, mem_budget=first, async_prefetch=True)
    with model, superllama.Context(model, n_ctx=1024, metrics_file=lines, metrics_interval_ms=250) as ctx:
        pieces = ctx.generate("Once upon a time", max_tokens=200 * (1 + len(others)), ignore_eos=True, seed=1)
        for i, _ in enumerate(pieces, 1):
            if i % 200 == 0 and others:
                model.set_budget(others.pop(0))
    return report(read_metrics(lines))


def whole_report(dark: bool = False) -> None:
    """A report from its top to its end."""
    with tempfile.TemporaryDirectory() as made:
        path, least, full, of_experts = mixture(Path(made))
        budgets = [max(least, full - int(part * of_experts)) for part in (0.95, 0.85, 0.5)]
        (Path(made) / "run.html").write_text(generated(path, Path(made) / "run.jsonl", budgets), encoding="utf-8")
        with chromium.open_page(browser(), Path(made) / "chromium") as shown:
            shown.look(1065, 900, dark)
            shown.open(f"file://{made}/run.html")
            shown.picture(IMAGES / "report.png")


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
    """The map of a report alone."""
    with tempfile.TemporaryDirectory() as made:
        path, least, full, of_experts = mixture(Path(made))
        budget = max(least, full - int(0.6 * of_experts))
        text = generated(path, Path(made) / "run.jsonl", [budget, budget])
    head, body = text.split("<body>")
    section = re.search(r'<section class="heat">.*?</section>', body, re.DOTALL)
    assert section is not None
    style = "<style>body { padding: 1rem; } section { margin: 0; }</style>"
    photograph(f"{head}{style}<body>{section[0]}</body></html>", folder / "experts.png", 760, 285, dark)


if __name__ == "__main__":
    pictures = {"top": top, "page": page, "report": whole_report, "experts": experts}
    for name in sys.argv[1:] or pictures:
        pictures[name]()
