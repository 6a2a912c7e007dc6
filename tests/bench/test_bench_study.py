"""run_experiment.py as a whole, with programs that only read the model's file."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench import matrix, report, run_experiment
from bench.cgroup import PREFIX, find_root
from bench.make_model import make_model
from bench.undo import start_time
from bench_helpers import ROOT, fake_build, needs_root
from test_bench_make_model import TINY

MATRIX = """
tokens = 4
prompt_tokens = 4
repeats = 2
scenarios = ["baseline", "300percent"]
engines = ["stock", "superllama"]
headroom = "64MiB"
[[model]]
path = "{dense}"
[[model]]
path = "{moe}"
"""


@pytest.fixture
def study(tmp_path, vocab):
    """(matrix file, build folder, log of the programs' calls)"""
    files = {}
    for kind, spec in TINY.items():
        files[kind] = tmp_path / f"{kind}.gguf"
        make_model(files[kind], vocab, spec)
    path = tmp_path / "matrix.toml"
    path.write_text(MATRIX.format(**files))
    return path, *fake_build(tmp_path / "build")


def arguments(study, out: Path) -> list[str]:
    tracer = ["--block-tracer", "none"] if os.geteuid() else []
    return ["--matrix", str(study[0]), "--out", str(out), "--build", str(study[1]), *tracer]


def test_matrix_resumes(study, tmp_path):
    out, log = tmp_path / "out", study[2]
    assert run_experiment.main(arguments(study, out)) == 0
    calls = log.read_text().splitlines()
    assert len(calls) == 16
    assert sum("--mem-budget" in c for c in calls) == 4  # without a limit no budget is given
    assert run_experiment.main(arguments(study, out)) == 0
    assert len(log.read_text().splitlines()) == 16  # nothing that finished is repeated
    removed = sorted((out / "runs").iterdir())[0]
    (removed / "run.json").unlink()
    assert run_experiment.main(arguments(study, out)) == 0
    assert len(log.read_text().splitlines()) == 17
    assert not list(out.glob("runs/*.partial"))
    run = json.loads((removed / "run.json").read_text())
    assert run["status"] == "ok"
    if "block_bytes" in run:
        assert run["block_bytes"] >= 0.95 * run["model_bytes"]

    page = report.write(out).read_text()
    assert "http://" not in page
    assert "https://" not in page
    assert page.count("data:image/png;base64,") >= 4
    summary = (out / "summary.md").read_text()
    assert "## dense: " in summary
    assert "How does swappiness change the pattern?" in summary


def test_order_alternates(study, tmp_path):
    jobs = matrix.load(study[0]).jobs(tmp_path)
    first, second = ([(j.model, j.scenario, j.engine) for j in jobs if j.repeat == i] for i in (0, 1))
    assert first == second[::-1]
    assert len({j.key for j in jobs}) == len(jobs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("scenarios = ['baseline']\nengines = ['stock']", r"names no \[\[model\]\]"),
        ("scenarios = ['x']\nengines = ['stock']\n[[model]]\npath = 'm'", "scenario 'x': baseline, a share"),
        ("engines = ['stock']\n[[model]]\npath = 'm'", "has no scenarios"),
        ("tokes = 1\nscenarios = ['baseline']\n[[model]]\npath = 'm'", "unknown tokes; known are"),
    ],
)
def test_wrong_matrix(tmp_path, text, message):
    path = tmp_path / "m.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        matrix.load(path)


def test_wrong_engine(study, tmp_path, capsys):
    assert run_experiment.main(["--model", str(tmp_path / "dense.gguf"), "--engine", "other"]) == 2
    assert "other" in capsys.readouterr().err


def test_failing_program_is_a_result(study, tmp_path):
    program = study[1] / "tests/native/probe"
    program.write_text(f"#!{sys.executable}\nimport sys\nsys.exit('probe: unknown option')\n")
    out = tmp_path / "out"
    assert run_experiment.main([*arguments(study, out)]) == 0
    states = [json.loads(p.read_text())["status"] for p in out.glob("runs/*/run.json")]
    assert (states.count("ok"), states.count("failed")) == (8, 8)
    report.write(out)
    assert "unknown option" in (out / "summary.md").read_text()


def groups_of(pid: int) -> list[Path]:
    root = find_root()
    return sorted(root.path.glob(f"{PREFIX}{pid}-*")) if root else []


@needs_root()
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_run_leaves_nothing(study, tmp_path, state_dir, how):
    swappiness = Path("/proc/sys/vm/swappiness")
    before = swappiness.read_text()
    build, log = fake_build(tmp_path / "slow", sleep=60)
    command = [sys.executable, str(ROOT / "bench/run_experiment.py"), "--model", str(tmp_path / "dense.gguf"),
               "--scenario", "900percent", "--engine", "stock", "--swappiness", "7", "--tokens", "4",
               "--build", str(build), "--out", str(tmp_path / "out")]  # fmt: skip
    child = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ)
    deadline = time.monotonic() + 60
    while not log.read_text() and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.05)
    journal = next(state_dir.glob("undo-*.jsonl"))
    entries = [json.loads(line) for line in journal.read_text().splitlines()]
    kinds = {e.get("kind") for e in entries}
    assert {"file", "process"} <= kinds, "the run changed nothing: the test would prove nothing"
    assert swappiness.read_text().strip() == "7"
    child.send_signal(how)
    child.wait(60)
    deadline = time.monotonic() + 20
    while journal.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not journal.exists()
    assert swappiness.read_text() == before
    assert not groups_of(child.pid)
    for entry in entries:
        if entry.get("kind") == "process":
            assert start_time(entry["pid"]) != entry["start"]
        if entry.get("kind") in ("rmdir", "cgroup"):
            assert not Path(entry["path"]).exists()


@needs_root()
def test_next_start_undoes_what_the_guard_could_not(tmp_path, state_dir):
    """Both the run and its guard are killed: the next journal finds the change and undoes it."""
    setting = tmp_path / "setting"
    setting.write_text("old")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        "from bench.undo import Journal\nfrom pathlib import Path\nimport os, signal\n"
        f"j = Journal()\nc = j.setting(Path({str(setting)!r}), 'new')\nc.__enter__()\n"
        "j._guard.kill(); j._guard.wait(); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ)
    assert setting.read_text() == "new"
    from bench.undo import Journal

    with Journal():
        assert setting.read_text() == "old"
