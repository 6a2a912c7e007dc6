"""`superllama top` of a server that is none: keys ask it for changes, and it goes away and comes back."""

from __future__ import annotations

import http.server
import json
import socketserver
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from statuses import metrics, shown, status

from superllama import Error, cli
from superllama._control import resume
from superllama._top.loop import Session, Watch
from superllama._top.sources import Server


class Fake(http.server.ThreadingHTTPServer):
    """The control plane of a server that can be paused. `gate` holds back the answers of what
    changes it, `looks` those of what looks at it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.found = status(state="ready")
        self.asked: list[tuple[str, Any]] = []
        self.error: str | None = None
        self.error_status = 400
        self.gate, self.looks, self.looked_at = threading.Event(), threading.Event(), threading.Event()
        self.gate.set()
        self.looks.set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answers(http.server.BaseHTTPRequestHandler):
    server: Fake

    def do_GET(self) -> None:
        found = self.server.found
        self.server.looked_at.set()
        self.server.looks.wait(30)
        self.answer(200, found)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        self.server.gate.wait(30)
        if self.server.error:
            self.answer(self.server.error_status, {"error": {"message": self.server.error}})
            return
        action = self.path.rpartition("/")[2]
        if action == "budget":
            self.server.found["metrics"]["mem_budget_bytes"] = body["mem_budget"]
        elif action == "pause":
            self.server.found = {k: v for k, v in self.server.found.items() if k not in ("metrics", "layers")}
            self.server.found["state"] = "paused"
        else:
            self.server.found = status(state="ready")
        self.answer(200, self.server.found)

    def answer(self, code: int, found: object) -> None:
        self.send_response(code)
        self.end_headers()
        self.wfile.write(json.dumps(found).encode())

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.gate.set()
        server.looks.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def session(fake: Fake) -> Session:
    found = Session(Server(fake.url, None))
    found.watch.take(found.watch.source.read())
    return found


def press(session: Session, key: str) -> str:
    """What the last line says when the key's answer is there."""
    session.press(key)
    session.finish()
    return session.message


def test_keys_change_the_budget_by_a_tenth_of_it(fake: Fake, session: Session) -> None:
    budget = 150 << 20
    assert press(session, "+") == "budget 165 MiB: ready, 0 B of 165 MiB in use"
    assert press(session, "-") == "budget 148 MiB: ready, 0 B of 148 MiB in use"
    assert fake.asked == [
        ("/superllama/budget", {"mem_budget": round(budget * 1.1)}),
        ("/superllama/budget", {"mem_budget": round(round(budget * 1.1) * 0.9)}),
    ]


def test_p_pauses_and_resumes(fake: Fake, session: Session) -> None:
    assert press(session, "p") == "pause: paused"
    assert "given back" in "\n".join(shown(session.picture()))
    assert press(session, "+") == "there is no budget to change: paused"
    assert press(session, "p").startswith("resume: ready")
    assert fake.asked == [("/superllama/pause", {}), ("/superllama/resume", {})]


def test_an_error_of_the_server_is_shown(fake: Fake, session: Session) -> None:
    fake.error = "mem_budget: 135 MiB are too few, the least that works is 140 MiB"
    assert press(session, "-") == f"{fake.url}: {fake.error}"
    assert fake.error in " ".join(shown(session.picture(), 80, 24)[-2:])


def test_without_dynamic_layers_there_is_no_budget_to_change(fake: Fake, session: Session) -> None:
    session.watch.take([status(metrics=metrics(mem_budget_bytes=0))])
    assert press(session, "+") == "there is no budget to change: no dynamic layers"
    assert fake.asked == []


def test_the_picture_goes_on_while_a_server_takes_its_time(fake: Fake, session: Session) -> None:
    fake.gate.clear()
    session.press("-")
    assert session.message == "budget 135 MiB: waiting for the answer"
    fake.found["metrics"]["token"] = 42
    session.watch.take(session.watch.source.read())
    assert session.picture().found["metrics"]["token"] == 42  # type: ignore[index]
    session.press("+")
    assert session.message == "budget 165 MiB: one at a time, budget 135 MiB is under way"
    fake.gate.set()
    session.finish()
    assert session.message == "budget 135 MiB: ready, 0 B of 135 MiB in use"
    assert len(fake.asked) == 1


def test_an_answer_that_was_under_way_tells_nothing_after_a_change(fake: Fake, session: Session) -> None:
    fake.looks.clear()
    fake.looked_at.clear()
    session.watch.look()
    assert fake.looked_at.wait(60)
    assert press(session, "p") == "pause: paused"
    fake.looks.set()
    looked(session.watch)
    assert session.watch.found is not None and session.watch.found["state"] == "paused"


def test_a_status_of_another_version(fake: Fake) -> None:
    del fake.found["metrics"]["stall_ms"]
    assert "another version" in looked(Watch(Server(fake.url, None))).problem


def test_space_holds_the_picture_and_keeps_what_happens(session: Session) -> None:
    session.press(" ")
    session.watch.take([status(metrics=metrics(1, token=7))])
    assert session.picture().found["metrics"]["token"] == 0  # type: ignore[index]
    assert session.message == "held; space goes on"
    session.press(" ")
    assert session.picture().found["metrics"]["token"] == 7  # type: ignore[index]


def looked(watch: Watch) -> Watch:
    """When it has looked once more."""
    watch._next_look = 0
    while not watch.look():
        pass
    return watch


def test_a_server_that_goes_away_and_comes_back(fake: Fake) -> None:
    source = Server(fake.url, None)
    watch = looked(Watch(source))
    assert watch.problem == "" and watch.found is not None
    real, source.url = source.url, "http://127.0.0.1:9"  # where nobody listens
    assert "no server answers there" in looked(watch).problem
    assert looked(watch).found is not None  # what was seen stays
    source.url = real
    assert looked(watch).problem == ""


def test_a_server_that_has_not_begun_is_waited_for() -> None:
    watch = looked(Watch(Server("http://127.0.0.1:9", None)))
    text = " ".join(shown(watch.picture(), 80, 24))
    assert "nothing seen yet" in text and "no server answers there" in text and "trying again" in text


def test_what_is_no_server_says_so() -> None:
    class Other(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.sendall(b"SSH-2.0-other\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Other) as other:
        thread = threading.Thread(target=other.handle_request)
        thread.start()
        with pytest.raises(Error, match=r"no server answers there .*SSH"):
            Server(f"http://127.0.0.1:{other.server_address[1]}", None).read()
        thread.join()


def test_an_older_server_says_what_it_cannot(fake: Fake, session: Session) -> None:
    fake.error_status, fake.error = 404, "File Not Found"
    assert press(session, "p") == f"{fake.url}: it knows no /superllama/pause: it is an older one"


def test_one_source_at_a_time(capsys: pytest.CaptureFixture[str]) -> None:
    for two in (
        ["--url", "http://a", "--pid", "1"],
        ["--pid", "1", "--metrics", "m"],
        ["--url", "u", "--metrics", "m"],
    ):
        with pytest.raises(SystemExit):
            cli.main(["top", *two])
        assert "not allowed with" in capsys.readouterr().err


def test_ps_of_a_paused_server(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    Server(fake.url, None).action("p", fake.found).work()  # type: ignore[union-attr]
    assert cli.main(["ps", "--url", fake.url]) == 0
    assert "paused" in capsys.readouterr().out
    assert resume(fake.url)["state"] == "ready"
