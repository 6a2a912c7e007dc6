"""The server's page: how it gets into a build, and, in Chromium, that one can chat with it."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from superllama._doctor import build_facts
from superllama._programs import find_program

ROOT = Path(__file__).resolve().parents[2]

# ---------------------------------------------------------------- into a build


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """cmake/page.py, with a tiny tree of upstream's, and nothing in its cache."""
    monkeypatch.syspath_prepend(ROOT / "cmake")
    spec = importlib.util.spec_from_file_location("page", ROOT / "cmake" / "page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "pristine/tools/ui").mkdir(parents=True)
    (tmp_path / "pristine/tools/ui/package.json").write_text("{}")
    monkeypatch.setattr(module, "pristine", lambda: tmp_path / "pristine")
    monkeypatch.setattr(module, "cache_dir", lambda: tmp_path / "cache")
    return module


def fake(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH; `npm run build` writes a page there, and each call a line into `calls`."""
    folder = tmp_path / "node"
    fake(folder, "node", "echo v22.1.0")
    npm = f"""echo "$@" >> {tmp_path}/calls
        [ "$1" = ci ] || {{ mkdir "$LLAMA_UI_OUT_DIR"; echo hi > "$LLAMA_UI_OUT_DIR/index.html"; }}"""
    fake(folder, "npm", npm)
    monkeypatch.setenv("PATH", f"{folder}:/bin:/usr/bin")
    return folder


def test_built_once_then_taken_from_the_cache(page: ModuleType, node: Path, tmp_path: Path) -> None:
    for tree in ("a", "b"):
        assert page.put(tmp_path / tree, "AUTO") == "page"
        assert (tmp_path / tree / "tools/ui/dist/index.html").read_text() == "hi\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [call.split()[0] for call in calls] == ["ci", "run"]
    assert "--ignore-scripts" in calls[0]


def test_a_source_distribution_brings_it(page: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    dist = tmp_path / "pristine/tools/ui/dist"
    dist.mkdir()
    (dist / "index.html").write_text("carried\n")
    (dist.parent / ("dist" + page.STAMP)).write_text(page.pin()["sha256"] + "\n")
    assert page.put(tmp_path / "tree", "ON") == "page"
    assert (tmp_path / "tree/tools/ui/dist/index.html").read_text() == "carried\n"


@pytest.mark.parametrize(
    ("version", "reason"), [(None, "Node.js and npm are not installed"), ("v18.20.4", "older than 20.19")]
)
def test_without_node_there_is_one_line(
    version: str | None, reason: str, page: ModuleType, node: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if version:
        fake(node, "node", f"echo {version}")
    else:
        monkeypatch.setenv("PATH", str(tmp_path))
    assert reason in page.put(tmp_path / "tree", "AUTO")
    lines = (tmp_path / "tree/tools/ui/dist/index.html").read_text().splitlines()
    assert len(lines) == 1 and "Node.js 20.19" in lines[0]
    with pytest.raises(page.UpstreamError, match=reason):
        page.put(tmp_path / "tree", "ON")


def test_npm_that_fails_leaves_nothing_behind(page: ModuleType, node: Path, tmp_path: Path) -> None:
    fake(node, "npm", "echo no route to host >&2; exit 1")
    assert "no route to host" in page.put(tmp_path / "tree", "AUTO")
    assert list((tmp_path / "cache/page").rglob("*.*")) == []
    assert page.put(tmp_path / "tree", "OFF") == "SUPERLLAMA_PAGE is OFF"


def test_a_page_replaces_the_line_and_the_line_a_page(page: ModuleType, node: Path, tmp_path: Path) -> None:
    index = tmp_path / "tree/tools/ui/dist/index.html"
    for mode, text in (("OFF", "without its page"), ("AUTO", "hi"), ("OFF", "without its page")):
        page.put(tmp_path / "tree", mode)
        assert text in index.read_text()


# ---------------------------------------------------------------- from the server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = (tmp_path_factory.mktemp("server") / "log").open("w")
    flags = ["-c", 2048, "-t", 2, "--temp", 0, "-n", 48, "--port", port]
    command = [str(part) for part in (find_program("llama-server"), "-m", demo_model, *flags)]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
                break
            time.sleep(0.2)
        yield url
    finally:
        process.kill()  # with an answer under way, SIGTERM is not enough
        process.wait(30)
        log.close()


def test_the_root_shows_the_page_or_how_to_get_it(server: str) -> None:
    request = urllib.request.Request(server, headers={"Accept-Encoding": "gzip"})
    with urllib.request.urlopen(request, timeout=30) as response:
        body = response.read()
        packed = response.headers.get("Content-Encoding") == "gzip"
    if build_facts()["page"]:
        import gzip

        assert b"<html" in (gzip.decompress(body) if packed else body)
    else:
        assert b"Node.js" in body and body.count(b"\n") == 1
        with urllib.request.urlopen(server, timeout=30) as response:  # for curl as well
            assert response.read() == body


# ---------------------------------------------------------------- in a browser


class Browser:
    """Chromium, by the protocol that chromedriver speaks; the little of it that a chat needs."""

    def __init__(self, port: int) -> None:
        self.base = f"http://127.0.0.1:{port}"
        arguments = ["--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,900"]
        always = {"browserName": "chrome", "goog:chromeOptions": {"args": arguments}}
        self.session = self.ask("POST", "/session", {"capabilities": {"alwaysMatch": always}})["sessionId"]

    def ask(self, method: str, path: str, data: dict[str, Any] | None = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.base + path, body, {"Content-Type": "application/json"}, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as e:
            raise AssertionError(e.read().decode(errors="replace")) from e

    def call(self, path: str, **data: Any) -> Any:
        return self.ask("POST", f"/session/{self.session}{path}", data)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.call("/execute/sync", script=script, args=list(arguments))

    def element(self, selector: str) -> str:
        found: dict[str, str] = self.call("/element", using="css selector", value=selector)
        return next(iter(found.values()))

    def until(self, script: str, seconds: float = 60) -> Any:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := self.run(script):
                return value
            time.sleep(0.1)
        raise AssertionError(
            f"never true: {script}; the page says: {self.run('return document.body.innerText')[:2000]}"
        )

    def screenshot(self, path: Path) -> bytes:
        png = base64.b64decode(self.ask("GET", f"/session/{self.session}/screenshot"))
        path.write_bytes(png)
        return png


@pytest.fixture
def browser() -> Iterator[Browser]:
    if shutil.which("chromium") is None or shutil.which("chromedriver") is None:
        pytest.skip("there is no chromium with its chromedriver")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    process = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            time.sleep(0.1)
        b = Browser(port)
        try:
            yield b
        finally:
            b.ask("DELETE", f"/session/{b.session}")
    finally:
        process.kill()
        process.wait(30)


@pytest.mark.slow
@pytest.mark.skipif(
    sys.platform != "linux" or "SUPERLLAMA_SCREENSHOTS" not in os.environ,
    reason="drives Debian's chromium for a minute or two; SUPERLLAMA_SCREENSHOTS names a folder for what was seen",
)
def test_a_chat_in_chromium(server: str, browser: Browser, tmp_path: Path) -> None:
    """Types a question, sees the answer grow, opens the settings. SUPERLLAMA_SCREENSHOTS: a folder for pictures."""
    if not build_facts()["page"]:
        pytest.skip("this build has no page")
    folder = Path(os.environ.get("SUPERLLAMA_SCREENSHOTS", tmp_path))
    browser.call("/url", url=server)
    browser.until("return document.querySelector('textarea') !== null")
    browser.until("return !document.querySelector('textarea').disabled")
    browser.screenshot(folder / "page-empty.png")
    box = browser.element("textarea")
    browser.call(f"/element/{box}/value", text="What is the capital of France? Tell me about it.\ue007")

    seen: list[str] = []
    end = time.monotonic() + 120
    while time.monotonic() < end and not (seen and "Paris" in seen[-1] and len(seen) > 5):
        text = browser.run("return document.body.innerText")
        if not seen or text != seen[-1]:
            seen.append(text)
        time.sleep(0.05)
    assert "Paris" in seen[-1], seen[-1]
    assert len(seen) > 2, "the answer came in one piece"
    browser.until("return /\\d t\\/s/.test(document.body.innerText)")
    browser.screenshot(folder / "page-answer.png")

    browser.until("""
        const gear = [...document.querySelectorAll('button, a')].find(
            e => /settings/i.test(e.ariaLabel ?? e.title) || e.querySelector('.lucide-settings'));
        gear?.click();
        return gear !== undefined""")
    browser.until("return /temperature|theme/i.test(document.body.innerText)")
    time.sleep(0.5)
    browser.screenshot(folder / "page-settings.png")
