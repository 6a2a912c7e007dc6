"""The control plane's page, in Chromium: before a server of superllama, and before one that says what a test wants."""

from __future__ import annotations

import base64
import contextlib
import copy
import hashlib
import json
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import chromium
import pytest
from serving import HttpServer, http_server

PAGE = Path(__file__).resolve().parents[2] / "src" / "server" / "page.html"
MIB = 1 << 20

Answer = tuple[int, bytes]
Answering = Callable[[str, str, bytes, dict[str, str]], Answer]


# ---------------------------------------------------------------- the file


def test_the_policy_names_the_style_and_the_script_that_there_are() -> None:
    text = PAGE.read_text(encoding="utf-8")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy is not None
    for tag in ("script", "style"):
        (inner,) = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(inner.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy[1]
    assert "default-src 'none'" in policy[1] and "unsafe" not in policy[1]


def test_nothing_comes_from_elsewhere_and_nothing_is_read_as_html() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, that nobody asks
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\bstyle=|\bon\w+=", text)
    assert ')---"' not in text and "@" not in re.sub(r"@media", "", text)  # what ends a C++ text, and CMake's names


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Page]:
    found = chromium.find()
    if found is None:
        pytest.skip("there is no Chromium")
    if sys.platform != "linux":
        pytest.skip("Chromium's pipe is tried on Linux only")
    with chromium.open_page(found, tmp_path_factory.mktemp("chromium")) as page:
        yield page


@contextlib.contextmanager
def served(answering: Answering, prefix: str = "") -> Iterator[str]:
    """The page at PREFIX/superllama/ui, and whatever `answering` says to the rest; its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            if self.path == f"{prefix}/superllama/ui":
                status, text, kind = 200, PAGE.read_bytes(), "text/html; charset=utf-8"
            else:
                status, text = answering(self.command, self.path.removeprefix(prefix), body, headers)
                kind = "application/json"
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}{prefix}/superllama/ui"
    finally:
        server.shutdown()
        server.server_close()


LAYERS = [
    {"index": i, "tier": tier, "bytes": 8 * MIB, "bytes_resident": resident * MIB, "loads": 1, "evictions": 0,
     "device": device}
    for i, (tier, resident, device) in enumerate([("host", 8, None), ("disk", 2, None), ("device", 8, "GPU0")])
]  # fmt: skip
STATUS: dict[str, Any] = {
    "version": "0.1.0",
    "upstream_build": "b1",
    "state": "ready",
    "requests_in_flight": 2,
    "dynamic_layers": True,
    "memory_used_bytes": 90 * MIB,
    "layers": LAYERS,
    "metrics": {
        "mem_budget_bytes": 100 * MIB,
        "vram_budget_bytes": 0,
        "vram_own_bytes": 0,
        "memory_by_tag": {"pinned": 50 * MIB, "kv": 30 * MIB, "ring": 10 * MIB, "compute": 0},
        "prompt_tokens": 10,
        **dict.fromkeys(("generated_tokens", "weight_bytes_read", "kv_bytes_read", "expert_hits", "expert_misses"), 0),
        "stall_ms": 0.0,
    },
}


class Fake:
    """A server as the page sees it. Counters grow with time, by what is in `per_s`."""

    def __init__(self) -> None:
        self.status = copy.deepcopy(STATUS)
        self.per_s: dict[str, float] = {}
        self.key = ""
        self.refuses = ""
        self.is_away = False
        self.asked: list[tuple[str, Any]] = []
        self.n_asked = 0
        self.begin = time.time()

    def __call__(self, method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        self.n_asked += 1
        if self.is_away:
            return 502, b"<h1>no backend</h1>"
        if self.key and headers.get("authorization") != f"Bearer {self.key}":
            return 401, json.dumps({"error": {"code": 401, "message": "no", "type": "auth"}}).encode()
        if method == "POST":
            asked = json.loads(body)
            self.asked.append((path, asked))
            if self.refuses:
                return 400, json.dumps({"error": {"code": 400, "message": self.refuses, "type": "x"}}).encode()
            if path == "/superllama/budget":
                mib = int(asked["mem_budget"].removesuffix("MiB"))
                self.status["metrics"]["mem_budget_bytes"] = mib * MIB
            if path == "/superllama/pause":
                self.status |= {"state": "paused", "dynamic_layers": False, "layers": []}
                self.status.pop("metrics")
            if path == "/superllama/resume":
                self.status = copy.deepcopy(STATUS)
        found = copy.deepcopy(self.status)
        if "metrics" in found:
            now = time.time()
            found["metrics"]["timestamp"] = datetime.fromtimestamp(now, timezone.utc).isoformat()
            for name, rate in self.per_s.items():
                found["metrics"][name] += rate * (now - self.begin)
        return 200, json.dumps(found).encode()


@pytest.fixture
def fake() -> Fake:
    return Fake()


@pytest.fixture
def page(browser: chromium.Page, fake: Fake) -> Iterator[chromium.Page]:
    browser.said.clear()
    browser.look(1000)
    with served(fake) as url:
        browser.open(url)
        browser.run("sessionStorage.clear()")
        browser.open(url)
        yield browser
        browser.open("about:blank")  # which asks no server that is gone


def hidden(page: chromium.Page, name: str) -> bool:
    return bool(page.run(f"document.getElementById({name!r}).checkVisibility() === false"))


def says(page: chromium.Page, text: str) -> None:
    page.until(f"document.body.innerText.includes({json.dumps(text)})", 20)


def test_what_a_status_says(page: chromium.Page) -> None:
    says(page, "90 MiB of 100 MiB")
    text = page.text()
    for words in ("ready", "2 requests run", "pinned 50 MiB", "kv 30 MiB", "ring 10 MiB", "in memory 1"):
        assert words in text
    assert "read when needed 1" in text and "on devices 1" in text
    titles = page.run("[...document.querySelectorAll('#row title')].map(t => t.textContent)")
    assert "layer 1: 8 MiB, 2 MiB in memory" in titles and "layer 2: 8 MiB, on GPU0" in titles
    assert hidden(page, "resume") and not hidden(page, "pause") and hidden(page, "key") and hidden(page, "away")
    assert page.said == []  # and nothing was against the policy


def test_rates_are_differences_of_counters(page: chromium.Page, fake: Fake) -> None:
    fake.per_s = {
        "generated_tokens": 40,
        "weight_bytes_read": 250e6,
        "stall_ms": 500,
        "expert_hits": 30,
        "expert_misses": 10,
    }
    page.until("document.querySelectorAll('#charts path.under').length >= 4")
    page.run("new Promise(done => setTimeout(done, 6500))")  # until what was before the rates is too old to count
    values = page.run("[...document.querySelectorAll('#charts b')].map(b => b.textContent)")
    tokens, read, waiting, experts = (float(value.split()[0]) for value in values)
    assert tokens == pytest.approx(40, rel=0.2) and read == pytest.approx(250, rel=0.2)
    assert (waiting, experts) == (pytest.approx(50, abs=10), pytest.approx(75, abs=2))
    fake.begin = time.time()  # counters begin again: another process, and no rate below zero
    page.run("new Promise(done => setTimeout(done, 2500))")
    assert "-" not in page.run("document.getElementById('charts').textContent")


def test_a_budget_is_set_when_the_slider_is_let_go(page: chromium.Page, fake: Fake) -> None:
    page.until("document.getElementById('slider').value === '100'")
    low, high = page.run("[slider.min, slider.max].map(Number)")
    assert low == 30 and high >= 100  # of what is no block; of the whole model and a little
    page.run("slider.value = 64; slider.dispatchEvent(new Event('input'))")
    says(page, "64 MiB")
    page.run("new Promise(done => setTimeout(done, 1300))")
    assert page.run("slider.value") == "64" and fake.asked == []  # held: no poll moves it, and nothing is asked yet
    page.run("slider.dispatchEvent(new Event('change'))")
    says(page, "The budget is 64 MiB.")
    assert fake.asked == [("/superllama/budget", {"mem_budget": "64MiB"})]

    fake.refuses = "mem_budget: a budget of 1 MiB is too small, the least that works is 50 MiB"
    page.run("budget.value = ' 1MiB '; document.getElementById('budget-form').requestSubmit()")
    says(page, f"Not changed: {fake.refuses}")
    assert fake.asked[-1] == ("/superllama/budget", {"mem_budget": "1MiB"})
    page.until("slider.value === '64'")


def test_pause_and_resume(page: chromium.Page, fake: Fake) -> None:
    says(page, "90 MiB of 100 MiB")
    page.run("pause.click()")
    says(page, "The memory has been given back.")
    assert "paused" in page.text() and hidden(page, "memory") and hidden(page, "pause") and hidden(page, "no-layers")
    fake.refuses = "it cannot be now"
    page.run("resume.click()")
    says(page, "The server did not resume: it cannot be now")
    fake.refuses = ""
    page.until("!resume.disabled")
    page.run("resume.click()")
    says(page, "90 MiB of 100 MiB")
    assert [path for path, _ in fake.asked] == [f"/superllama/{what}" for what in ("pause", "resume", "resume")]
    assert hidden(page, "control-said")


def test_a_key_is_asked_for_and_kept(page: chromium.Page, fake: Fake) -> None:
    says(page, "90 MiB of 100 MiB")
    fake.key = "secret"
    says(page, "wants its API key")
    assert hidden(page, "main")
    page.run(
        "document.getElementById('key-field').value = 'wrong'; document.getElementById('key-form').requestSubmit()"
    )
    says(page, "This key was refused.")
    page.run(
        "document.getElementById('key-field').value = 'secret'; document.getElementById('key-form').requestSubmit()"
    )
    says(page, "90 MiB of 100 MiB")
    page.open(page.run("location.href"))
    says(page, "90 MiB of 100 MiB")
    assert page.run("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]


def test_it_goes_on_when_a_server_was_away(page: chromium.Page, fake: Fake) -> None:
    says(page, "90 MiB of 100 MiB")
    fake.is_away = True
    says(page, "No answer since")
    assert "502" in page.text() and "Trying again" in page.text()
    fake.is_away = False
    page.until("document.getElementById('away').hidden")
    says(page, "ready")


def test_what_a_server_says_is_text(page: chromium.Page, fake: Fake) -> None:
    bad = "<img src=x onerror=document.title='broken'>"
    says(page, "ready")
    fake.status["metrics"]["memory_by_tag"] = {bad: 40 * MIB}
    fake.status |= {"state": bad, "reason": bad, "version": bad}
    fake.status["layers"][2]["device"] = bad
    says(page, bad)
    fake.refuses = bad
    page.run("budget.value = '1'; document.getElementById('budget-form').requestSubmit()")
    says(page, f"Not changed: {bad}")
    assert page.run("[document.title, document.images.length]") == ["superllama", 0]


def test_below_a_prefix(browser: chromium.Page, fake: Fake) -> None:
    with served(fake, "/some/where") as url:
        browser.open(url)
        says(browser, "90 MiB of 100 MiB")
        browser.open("about:blank")


def test_it_is_not_polled_where_nobody_looks(page: chromium.Page, fake: Fake) -> None:
    says(page, "ready")
    page.run("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    page.run("document.dispatchEvent(new Event('visibilitychange'))")
    fake.status["state"] = "degraded"
    page.run("new Promise(done => setTimeout(done, 2500))")
    assert "degraded" not in page.text()
    page.run("Object.defineProperty(document, 'hidden', {value: false})")
    page.run("document.dispatchEvent(new Event('visibilitychange'))")
    says(page, "degraded")


def test_it_does_nothing_within_a_page_of_another_site(browser: chromium.Page, fake: Fake) -> None:
    with served(fake) as url:
        browser.open("data:text/html,<title>other</title>")
        browser.run(f"""new Promise(done => {{
            const frame = document.createElement("iframe");
            frame.onload = () => setTimeout(done, 1000);
            frame.src = {json.dumps(url)};
            document.body.append(frame);
        }})""")
        assert fake.n_asked == 0
        browser.open(url)
        says(browser, "ready")
        assert fake.n_asked > 0
        browser.open("about:blank")


@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_wider_than_the_window(page: chromium.Page, fake: Fake, width: int) -> None:
    fake.status["layers"] = [LAYERS[1] | {"index": i} for i in range(130)]
    page.look(width)
    says(page, "read when needed 130")
    assert page.run("document.documentElement.scrollWidth") <= width


# ---------------------------------------------------------------- before a server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, demo_model: Path) -> Iterator[HttpServer]:
    if sys.platform != "linux":
        pytest.skip("dynamic layers need Linux")
    flags = ("-c", 1024, "-np", 1, "--mem-budget", "300MiB", "--async-prefetch")
    with http_server(demo_model, tmp_path_factory.mktemp("log") / "log", *flags) as found:
        yield found


def test_a_servers_memory_in_chromium(browser: chromium.Page, server: HttpServer) -> None:
    def forward(method: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        kept = {name: headers[name] for name in ("content-type", "sec-fetch-site", "authorization") if name in headers}
        data = body if method == "POST" else None
        request = urllib.request.Request(f"http://127.0.0.1:{server.port}{path}", data, kept, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as e:
            return e.code, e.read()

    browser.said.clear()
    server.complete("One, two,", n_predict=4)
    with served(forward) as url:
        browser.look(1000)
        browser.open(url)
        says(browser, "of 300 MiB")
        browser.until("document.querySelectorAll('#row rect').length > 20")
        browser.run("budget.value = '250MiB'; document.getElementById('budget-form').requestSubmit()")
        says(browser, "The budget is 250 MiB")
        says(browser, "of 250 MiB")
        assert server.request("/superllama")[1]["metrics"]["mem_budget_bytes"] == 250 * MIB
        browser.run("budget.value = '1MiB'; document.getElementById('budget-form').requestSubmit()")
        says(browser, "the least that works")
        browser.until("slider.value === '250'")

        browser.run("pause.click()")
        says(browser, "The memory has been given back.")
        assert server.request("/superllama")[1]["state"] == "paused"
        browser.run("resume.click()")
        says(browser, "of 250 MiB")
        assert server.request("/superllama")[1]["state"] == "ready"
        assert [line for line in browser.said if "400" not in line] == []  # of the browser: the refused request
        browser.open("about:blank")
