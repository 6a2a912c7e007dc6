"""`superllama doctor`: its report is complete, its read speed is measured on a real file."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from running import Runner

import superllama
from superllama import _backends, _doctor, cli
from superllama._look.amounts import size


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
    assert {"https", "page", "openmp", "portable", "compiler"} <= found["build"].keys()
    assert set(found["cpu"]["amx"]) == {"cpu", "build"}
    assert found["huge_pages"] in ("always", "madvise", "never", None)


def test_the_report_for_people(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_doctor, "READ_BYTES", 5 << 20)
    assert cli.main(["doctor", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    words = ("versions", "devices", "memory", "read speed", "locked memory", "GB/s", "HTTPS", "page", "OpenMP", "AMX")
    for word in (*words, "huge pages", "cgroup", "CPU quota", "CPU pressure"):
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


# ---------------------------------------------------------------- what the system allows


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


@pytest.mark.skipif(sys.platform != "linux", reason="affinity is Linux's")
def test_threads_are_those_that_have_a_core(run_python: Runner) -> None:
    script = """
import os
cpu = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {cpu})
from superllama._memory import n_physical_cores
assert n_physical_cores() == 1
"""
    done = run_python(script)
    assert done.returncode == 0, done.stderr


def test_cpu_pressure(tmp_path: Path) -> None:
    assert _doctor.cpu_pressure(tmp_path) is None
    (tmp_path / "proc/pressure").mkdir(parents=True)
    (tmp_path / "proc/pressure/cpu").write_text("some avg10=99.43 avg60=9.5 avg300=9.1 total=45\nfull avg10=0.00\n")
    assert _doctor.cpu_pressure(tmp_path) == pytest.approx(0.9943)


def test_huge_pages_and_flags(tmp_path: Path) -> None:
    assert _doctor.huge_pages(tmp_path) is None
    assert _doctor.cpu_flags(tmp_path) == set()
    write(tmp_path, "sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
    write(tmp_path, "proc/cpuinfo", "processor : 0\nflags\t\t: fpu amx_int8\n\nprocessor : 1\n")
    assert _doctor.huge_pages(tmp_path) == "madvise"
    assert "amx_int8" in _doctor.cpu_flags(tmp_path)


# ---------------------------------------------------------------- backends in packages of their own


def test_a_backend_package_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "superllama_blas/__init__.py", "")
    write(tmp_path, "superllama_blas/libggml-blas.so", "")
    monkeypatch.syspath_prepend(tmp_path)
    file = tmp_path / "superllama_blas" / "libggml-blas.so"
    assert file in _backends.backend_files()
    assert _backends.for_programs({"GGML_BACKEND_PATH": "/mine"}, tmp_path).get("GGML_BACKEND_PATH") is None
    assert _backends.for_programs({}, tmp_path)["GGML_BACKEND_PATH"] == str(_backends.backend_files()[0])
