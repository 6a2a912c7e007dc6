"""`superllama doctor`: its report is complete, its read speed is measured on a real file."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import superllama
from superllama import _doctor, cli
from superllama._show import size


def test_the_report_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(3_000_000))
    assert cli.main(["doctor", "--json", str(file)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["versions"]["superllama"] == superllama.__version__ == found["versions"]["library"]
    assert re.fullmatch(r"b\d+", found["versions"]["llama.cpp build"])
    assert "CPU" in found["backends"]
    assert "CPU" in [d["name"] for d in found["devices"]]
    assert 0 < found["memory"]["host_available"] <= found["memory"]["host_total"] <= found["memory"]["machine_total"]
    assert found["read_speed"]["bytes"] == 3_000_000
    assert found["read_speed"]["gb_per_s"] > 0
    assert found["cpu"]["physical_cores"] >= 1


def test_the_report_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_doctor, "READ_BYTES", 5 << 20)
    assert cli.main(["doctor", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for word in ("versions", "devices", "memory", "read speed", "locked memory", "GB/s"):
        assert word in out
    assert list(tmp_path.iterdir()) == []  # the file that was written for the measurement


def test_a_missing_folder_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "/no/such/folder"]) == 2
    assert capsys.readouterr().err == "superllama doctor: /no/such/folder does not exist\n"


def test_a_folder_that_cannot_be_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "/proc"]) == 1
    assert "/proc" in capsys.readouterr().err


def test_cpu_features() -> None:
    assert _doctor.cpu_features("CPU : SSE3 = 1 | AVX2 = 0 | OPENMP = 1 | ") == ["SSE3", "OPENMP"]


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (98_362_432, "98.4 MB"), (2**64 - 1, "unlimited")],
)
def test_sizes(n_bytes: int, text: str) -> None:
    assert size(n_bytes) == text
