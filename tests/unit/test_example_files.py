"""Files in examples/ name flags, variables and metrics that exist."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from serving import http_server

from superllama._commands.program_flags import flags_of

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
COUNTER = re.compile(r"_total$")


@pytest.fixture(scope="module")
def flags() -> set[str]:
    return {name for flag in flags_of("llama-server") for name in flag.names}


@pytest.fixture(scope="module")
def variables() -> set[str]:
    return {name for flag in flags_of("llama-server") for name in flag.variables}


# ---------------------------------------------------------------- ways to start a server


def entrypoint() -> list[str]:
    line = re.search(r"^ENTRYPOINT (.*)$", (EXAMPLES / "Dockerfile").read_text(), re.MULTILINE)
    assert line
    words: list[str] = json.loads(line[1])
    return words


def test_the_image_starts_a_server(flags: set[str]) -> None:
    program, *words = entrypoint()
    assert program == "superllama-server"
    assert {word for word in words if word.startswith("-")} <= flags


def test_the_composition_starts_a_server(flags: set[str], variables: set[str]) -> None:
    text = (EXAMPLES / "compose.yaml").read_text()
    command = re.search(r"command: (\[.*\])", text)
    assert command and {word for word in json.loads(command[1]) if word.startswith("-")} <= flags
    assert set(re.findall(r"(LLAMA_\w+):", text)) <= variables
    assert f'"127.0.0.1:8080:{entrypoint()[entrypoint().index("--port") + 1]}"' in text


def test_the_service_starts_a_server(flags: set[str]) -> None:
    text = (EXAMPLES / "superllama-server.service").read_text().replace("\\\n", " ")
    command = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)
    assert command
    program, *words = command[1].split()
    assert Path(program).name == "superllama-server"
    assert {word for word in words if word.startswith("-")} <= flags
    assert "--api-key-file" in text and "--api-key-file" in flags


def test_systemd_takes_the_service(tmp_path: Path) -> None:
    verify = shutil.which("systemd-analyze")
    if verify is None:
        pytest.skip("there is no systemd-analyze on this machine")
    text = (EXAMPLES / "superllama-server.service").read_text()
    unit = tmp_path / "superllama-server.service"
    unit.write_text(re.sub(r"(?<=ExecStart=)\S+", sys.executable, text))  # it has to be there
    done = subprocess.run([verify, "verify", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ---------------------------------------------------------------- the dashboard


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EXAMPLES / "grafana.json").read_text())
    return found


def expressions() -> list[str]:
    return [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]


def names(text: str, prefix: str) -> set[str]:
    return set(re.findall(rf"\b{prefix}:(\w+)", text))


def test_metrics_of_the_dashboard_exist() -> None:
    source = ROOT / "src/server/prometheus.cpp"
    if not source.exists():
        pytest.skip("this tree has no metrics of ours for Prometheus")
    text = source.read_text()
    known = set(re.findall(r'(?:family|by_tier)\("(\w+)"', text))
    known |= set(re.findall(r'\{ "(\w+)", "[^"]+", "\w+",\s*[\de.-]+ \}', text))
    assert {"build_info", "layers", "stall_seconds_total"} <= known
    assert names("\n".join(expressions()), "superllama") == known


def test_metrics_of_upstream_exist(tiny_model: Path, tmp_path: Path) -> None:
    with (
        http_server(tiny_model, tmp_path / "log", "--metrics", "-c", 64) as server,
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=60) as answer,
    ):
        known = names(answer.read().decode(), "llamacpp")
    used = names("\n".join(expressions()), "llamacpp")
    assert used and used <= known


def test_counters_are_rates_and_nothing_else_is() -> None:
    for expression in expressions():
        for name in re.findall(r"(?:superllama|llamacpp):\w+", expression):
            is_rate = re.search(rf"rate\({name}{{[^}}]*}}\[\$__rate_interval\]\)", expression) is not None
            assert is_rate == (COUNTER.search(name) is not None), expression


def test_panels_can_be_told_apart_and_do_not_overlap() -> None:
    panels = dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    assert all(panel["title"] and (panel["type"] == "row" or panel["description"]) for panel in panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24


def test_variables_of_the_dashboard_are_defined() -> None:
    text = json.dumps(dashboard())
    defined = {variable["name"] for variable in dashboard()["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$\{?(\w+)", text)) == defined
