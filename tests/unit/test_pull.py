"""`superllama pull` and `superllama list`, against a repository of this machine's own."""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import superllama
from superllama import cli
from superllama._commands.pull import pull
from superllama._models import found_models, huggingface_folder

COMMIT = "a" * 40
FILES = ("m-Q4_K_M.gguf", "m-Q8_0.gguf", "sub/m-F16-00001-of-00002.gguf", "sub/m-F16-00002-of-00002.gguf")


class Hub(http.server.BaseHTTPRequestHandler):
    """What llama.cpp asks of Hugging Face, for one repository."""

    data = b""
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET(body=False)

    def do_GET(self, body: bool = True) -> None:
        path = self.path.partition("?")[0]
        self.asked.append(f"{self.command} {path}")
        status, answer = 200, b""
        if path == "/api/models/org/repo-GGUF/refs":
            answer = json.dumps({"branches": [{"name": "main", "targetCommit": COMMIT}]}).encode()
        elif path == f"/api/models/org/repo-GGUF/tree/{COMMIT}":
            answer = json.dumps([self.entry(name) for name in FILES]).encode()
        elif path.startswith(f"/org/repo-GGUF/resolve/{COMMIT}/") and "Q8_0" not in path:
            answer = self.data
        else:
            status = 403 if "gated" in path else 500 if "Q8_0" in path else 404
            answer = b"<html>a page</html>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer if body else b"")

    def entry(self, name: str) -> dict[str, object]:
        oid = hashlib.sha256(name.encode()).hexdigest()
        return {"type": "file", "path": name, "size": len(self.data), "oid": "b" * 40, "lfs": {"oid": oid}}

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What is asked of a hub, which this machine's Hugging Face is; an empty cache, and no other models."""
    for variable in ("LLAMA_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN", "MODEL_ENDPOINT"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("OLLAMA_MODELS", "LMSTUDIO_MODELS"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    Hub.data, Hub.asked = tiny_model.read_bytes(), []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Hub.asked
        server.shutdown()


def test_a_model_is_fetched_once(hub: list[str], tiny_model: Path) -> None:
    pulled = pull("hf:org/repo-GGUF")
    assert pulled.model.name == "huggingface:org/repo-GGUF/m-Q4_K_M.gguf" and pulled.warning == ""
    assert pulled.model.path.read_bytes() == tiny_model.read_bytes()
    hub.clear()
    assert pull("org/repo-GGUF:q4_k_m") == pulled
    assert not any("resolve" in asked for asked in hub)
    with superllama.LLM("hf:org/repo-GGUF", n_ctx=64, n_threads=1) as llm:
        assert llm.generate("the", max_tokens=1).usage.generated_tokens == 1


def test_all_parts_are_fetched(hub: list[str], tiny_model: Path) -> None:
    model = pull("hf:org/repo-GGUF:F16").model
    assert model.name == "huggingface:org/repo-GGUF/sub/m-F16-00001-of-00002.gguf"
    assert model.bytes == 2 * tiny_model.stat().st_size


def test_what_is_here_needs_no_network(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = pull("hf:org/repo-GGUF").model
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    again = pull("hf:org/repo-GGUF")
    assert again.model == model and "connection" in again.warning
    with pytest.raises(superllama.DownloadError, match=r"hf:org/other .* there are huggingface:org/repo"):
        pull("hf:org/other")


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("hf:org/none", r"GET failed \(404\); there is no such repository$"),
        ("hf:org/gated", r"GET failed \(403\); .*HF_TOKEN"),
        ("hf:org/repo-GGUF:Q2_K", r"the repository has m-Q4_K_M.gguf, m-Q8_0.gguf, sub/"),
        ("hf:org/repo-GGUF:Q8_0", r"failed with status code: 500"),
    ],
)
def test_what_cannot_be_fetched(hub: list[str], name: str, why: str) -> None:
    with pytest.raises(superllama.DownloadError, match=f"{name} cannot be fetched: .*{why}"):
        pull(name)
    assert found_models() == []


@pytest.mark.parametrize("name", ["", "model.gguf", "ollama:llama3", "hf:", "hf:a/b/c", "hf:a/b:", "-hf"])
def test_other_names(name: str) -> None:
    with pytest.raises(superllama.RequestError, match="hf:ORG/REPO"):
        pull(name)


def test_the_command(hub: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pull", "hf:org/repo-GGUF"]) == 0
    assert "huggingface:org/repo-GGUF/m-Q4_K_M.gguf" in capsys.readouterr().out
    assert cli.main(["list"]) == 0
    assert "huggingface:org/repo-GGUF/m-Q4_K_M.gguf" in capsys.readouterr().out
    assert cli.main(["pull", "hf:org/repo-GGUF", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == "huggingface:org/repo-GGUF/m-Q4_K_M.gguf"
    assert cli.main(["pull", "hf:org/none"]) == 1
    assert capsys.readouterr().err.startswith("superllama: hf:org/none cannot be fetched")


def test_an_engine_says_why_it_has_no_model(hub: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(superllama.DownloadError, match="there is no such repository"):
        superllama.LLM("hf:org/none")
    with superllama.LLM("hf:org/repo-GGUF", n_ctx=64, n_threads=1):
        pass
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with superllama.LLM("hf:org/repo-GGUF", n_ctx=64, n_threads=1):  # what is here needs no network
        pass
    with pytest.raises(superllama.DownloadError, match=r"hf:org/nothing cannot be fetched: .*connection"):
        superllama.LLM("hf:org/nothing")


def test_run_fetches_what_it_answers_with(hub: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["the", "-n", "1", "-c", "64", "-t", "1"]
    assert cli.main(["run", "hf:org/repo-GGUF", *words]) == 0
    assert any("resolve" in asked for asked in hub)
    capsys.readouterr()
    assert cli.main(["run", "hf:org/none", *words]) == 1
    assert "there is no such repository" in capsys.readouterr().err


def test_where_llama_cpp_downloads_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names = ["LLAMA_CACHE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"]
    below = ["", "", "", "hub", "huggingface/hub"]
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in names:
        monkeypatch.setenv(name, str(tmp_path / name))
    for name, folder in zip(names, below, strict=True):
        assert huggingface_folder() == tmp_path / name / folder
        monkeypatch.delenv(name)
    assert huggingface_folder() == tmp_path / ".cache/huggingface/hub"
