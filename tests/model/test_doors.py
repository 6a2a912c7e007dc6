"""run, chat, serve and bench once each, as a user types them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from rpc_devices import free_port
from serving import healthy

QUESTION = "What is the capital of Italy? Answer with one word."
COMMAND = [sys.executable, "-m", "superllama"]


def superllama(*words: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    done = subprocess.run([*COMMAND, *map(str, words)], input=stdin, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done


def test_run_prints_an_answer_and_nothing_else(demo_model: Path, tmp_path: Path) -> None:
    flags = ["--temp", 0, "-n", 16, "-c", 512]
    done = superllama("run", demo_model, QUESTION, *flags)
    assert "Rome" in done.stdout and done.stdout.count("\n") == 1 and done.stderr == ""
    assert superllama("run", demo_model, *flags, stdin=QUESTION + "\n").stdout == done.stdout
    settings = tmp_path / "s.toml"
    settings.write_text(f'model = "{demo_model}"\ntemp = 0\nn-predict = 16\nctx-size = 512\nport = 1\n')
    assert superllama("run", "--config", settings, QUESTION).stdout == done.stdout


def test_run_goes_on_with_a_text_where_there_is_no_template(tiny_model: Path) -> None:
    done = superllama("run", tiny_model, "the", "-n", 4, "--temp", 0, "-c", 64, "-t", 1)
    assert done.stdout and done.stderr == ""


def test_chat(demo_model: Path) -> None:
    done = superllama("chat", demo_model, "--temp", 0, "-n", 16, "-c", 512, stdin=f"{QUESTION}\n/exit\n")
    assert "Rome" in done.stdout


def test_bench(tiny_model: Path) -> None:
    done = superllama("bench", tiny_model, "-p", 8, "-n", 0, "-r", 1, "-t", 1, "-o", "json")
    (measured,) = json.loads(done.stdout)
    assert measured["n_prompt"] == 8 and measured["model_filename"] == str(tiny_model)


def ask(port: int, path: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", data, timeout=120) as answer:
        return json.load(answer)


@pytest.mark.skipif(sys.platform == "win32", reason="presets in a file of POSIX")
def test_serve_offers_the_models_of_a_file(tiny_model: Path, tmp_path: Path) -> None:
    port = free_port()
    table = f'model = "{tiny_model}"\nn-predict'
    (tmp_path / "s.toml").write_text(
        f"port = {port}\nctx-size = 256\nthreads = 1\nui = false\nwarmup = false\n"
        f"[models.short]\n{table} = 2\n[models.long]\n{table} = 4\nctx-size = 128\n"
    )
    server = subprocess.Popen(
        [*COMMAND, "serve", "--config", str(tmp_path / "s.toml")], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not healthy(port):
            assert server.poll() is None
            time.sleep(0.05)
        found = {model["id"]: model["status"]["args"] for model in ask(port, "/models")["data"]}
        assert {"short", "long"} <= set(found)
        size = {name: args[args.index("--ctx-size") + 1] for name, args in found.items() if name in ("short", "long")}
        assert size == {"short": "256", "long": "128"}
        for name, n_tokens in (("short", 2), ("long", 4)):
            answer = ask(port, "/v1/completions", {"model": name, "prompt": "the", "ignore_eos": True})
            assert answer["usage"]["completion_tokens"] == n_tokens
    finally:
        server.terminate()
        assert server.wait(60) == 0
