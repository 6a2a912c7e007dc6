"""The file of repacked blocks: it is of this model, whole, and private, or it is not used; whatever is wrong with it
costs time, never an answer."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from superllama._native import ffi, lib

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")

# Loads models in turn, or at once, and reports of each: a hash of its logits, and what the log said of the file.
SCRIPT = """
import hashlib, json, logging, os, signal, sys, threading, time
import numpy as np
import superllama
from dynamic import CONTEXT, budgets, layout

task = json.loads(sys.argv[1])
said = []
class Said(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("superllama").setLevel(logging.INFO)
logging.getLogger("superllama").addHandler(Said())

def progress(done):
    if task["stop"]:
        time.sleep(0.11) # the next part asks again, however fast the disk: nothing is complete before 0.3
    if task["stop"] and done > 0.3:
        if task["stop"] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return False
    return True

def run(path, **kwargs):
    with superllama.Model(path, progress=progress, **kwargs) as model, superllama.Context(model, **CONTEXT) as ctx:
        rows = []
        for token in (1000, 1001, 1002):
            ctx.decode([token])
            rows.append(ctx.logits()[0].copy())
        exec(task["then"])
    return hashlib.sha256(np.stack(rows).tobytes()).hexdigest()

def dynamic(path):
    least, full = budgets(path)
    return run(path, dynamic_layers=True, mem_budget=least + (8 << 20), check_tensors=task["check"])

if not layout(task["models"][0]).repacked_bytes:
    print("null")
    sys.exit()
results = []
if task["stock"]:
    results += [run(path) for path in task["models"]]
def one(path):
    try:
        results.append(dynamic(path))
    except superllama.Error as e:
        results.append(f"{type(e).__name__}: {e}")
if task["at_once"]:
    threads = [threading.Thread(target=one, args=(path,)) for path in task["models"]]
    [t.start() for t in threads]
    [t.join() for t in threads]
else:
    [one(path) for path in task["models"]]
print(json.dumps([results, [s.strip() for s in said if "repacked" in s or "repack" in s]]))
"""


@dataclasses.dataclass
class Loads:
    """A folder for the file, and models; the processor's tiles are hidden, for they take no repacked layout."""

    folder: Path
    shim: Path
    model: Path
    variables: dict[str, str] = dataclasses.field(default_factory=dict)

    def environment(self, missing: str = "") -> dict[str, str]:
        mine = {"LD_PRELOAD": str(self.shim), "FAULT_NO": f"amx {missing}", "FAULT_PATH": str(self.folder)}
        tests = os.pathsep.join(str(p) for p in (Path(__file__).parent.parent,))
        return {**os.environ, "SUPERLLAMA_CACHE": str(self.folder), "PYTHONPATH": tests, **mine, **self.variables}

    def start(self, *models: Path, missing: str = "", wrap: tuple[str, ...] = (), **kwargs: object) -> subprocess.Popen:
        task = {"models": [str(m) for m in models or (self.model,)], "stock": False, "at_once": False, "stop": ""}
        task |= {"check": False, "then": ""} | kwargs
        command = [*wrap, sys.executable, "-c", SCRIPT, json.dumps(task)]
        return subprocess.Popen(
            command, env=self.environment(missing), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def __call__(self, *models: Path, **kwargs: object) -> tuple[list[str], list[str]]:
        return self.done(self.start(*models, **kwargs))  # type: ignore[arg-type]

    def done(self, process: subprocess.Popen) -> tuple[list[str], list[str]]:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        answer = json.loads(out)
        if answer is None:
            pytest.skip("this CPU has no repacked kernels")
        return answer[0], answer[1]

    def files(self) -> list[Path]:
        folder = self.folder / "repacked"
        return sorted(folder.iterdir()) if folder.exists() else []

    def file(self) -> Path:
        (file,) = self.files()
        return file


@pytest.fixture(scope="session")
def q4_0(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in a quantization that CPUs have repacked kernels for."""
    path = tmp_path_factory.mktemp("q4_0") / "model.gguf"
    params = lib.llama_model_quantize_default_params()
    params.ftype = lib.LLAMA_FTYPE_MOSTLY_Q4_0
    params.allow_requantize = params.pure = True
    c = ffi.new("llama_model_quantize_params *", params)
    assert lib.llama_model_quantize(str(demo_model).encode(), str(path).encode(), c) == 0
    return path


@pytest.fixture(scope="session")
def reference(q4_0: Path, fault_shim: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return Loads(tmp_path_factory.mktemp("none"), fault_shim, q4_0)(stock=True)[0][0]


@pytest.fixture
def loads(q4_0: Path, tmp_path: Path, fault_shim: Path) -> Loads:
    return Loads(tmp_path / "cache", fault_shim, q4_0)


def changed(model: Path, path: Path, change: Callable[[bytearray], None], tensors: list[str]) -> Path:
    """A copy of the model, with equal times, whose tensors of these names are different."""
    shutil.copyfile(model, path)
    places = {t.name: (int(t.data_offset), int(t.n_bytes)) for t in gguf.GGUFReader(model).tensors}
    with path.open("r+b") as f:
        for offset, size in (places[name] for name in tensors):
            f.seek(offset)
            data = bytearray(f.read(size))
            change(data)
            f.seek(offset)
            f.write(data)
    for each in (model, path):
        os.utime(each, ns=(10**18, 10**18))
    return path


def tune(data: bytearray) -> None:
    data[2::18] = bytes(255 - b for b in data[2::18])


def tune_a_little(data: bytearray) -> None:
    """Far from the middle, where samples are taken."""
    data[18 * 64 + 2 : 18 * 128 : 18] = bytes(255 - b for b in data[18 * 64 + 2 : 18 * 128 : 18])


# ---------------------------------------------------------------- of this model


def test_another_model_of_equal_shape_and_times(loads: Loads, q4_0: Path, tmp_path: Path) -> None:
    other = changed(q4_0, tmp_path / "tuned.gguf", tune, [f"blk.{i}.ffn_down.weight" for i in range(10, 30)])
    results, _ = loads(q4_0, other, stock=True)
    assert results[:2] == results[2:]
    assert results[0] != results[1]
    assert len(loads.files()) == 2
    results, _ = loads(other, q4_0, q4_0, other, stock=True)
    assert results[:4] == results[4:]


def test_another_model_that_samples_do_not_tell_apart(loads: Loads, q4_0: Path, tmp_path: Path) -> None:
    other = changed(q4_0, tmp_path / "edited.gguf", tune_a_little, ["blk.12.ffn_down.weight"])
    first, _ = loads(q4_0, stock=True)
    file = loads.file()
    second, said = loads(other, stock=True)
    assert first[0] == first[1]
    assert second[0] == second[1] != first[0]
    assert sum("was made from another model" in s for s in said) == 1
    assert not file.exists()  # the next load writes it anew
    again, _ = loads(other)
    assert again == second[:1]
    assert loads(q4_0)[0] == first[:1]


def origins(file: Path) -> int:
    with file.open("rb") as f:
        head = f.read(56 + 16 * 16)
    return sum(check != 0 for check in struct.unpack_from("<32Q", head, 56)[1::2])


def test_a_copy_of_the_model_uses_its_file(loads: Loads, q4_0: Path, tmp_path: Path, reference: str) -> None:
    assert loads()[0] == [reference]
    written = loads.file().stat()
    assert origins(loads.file()) == 1
    copy = Path(shutil.copyfile(q4_0, tmp_path / "copy.gguf"))
    os.utime(copy)
    for _ in range(2):
        results, said = loads(copy)
        assert results == [reference]
        assert "taken from" in said[-1]
        assert loads.file().stat().st_ino == written.st_ino
        assert origins(loads.file()) == 2  # all blocks were compared: the next time there is nothing to prove


def test_the_layout_of_this_processor(loads: Loads, q4_0: Path, tmp_path: Path) -> None:
    """Whatever it is, tiles too: a block that is converted twice is the same twice."""
    loads.variables = {"FAULT_NO": ""}
    first, _ = loads(stock=True)
    assert first[0] == first[1]
    copy = Path(shutil.copyfile(q4_0, tmp_path / "copy.gguf"))
    for _ in range(2):
        results, said = loads(copy)
        assert results == first[:1]
        assert "taken from" in said[-1]
        assert origins(loads.file()) == 2


# ---------------------------------------------------------------- whole


@pytest.mark.parametrize("missing", ["", "tmpfile", "proc"])
def test_loads_at_once(loads: Loads, q4_0: Path, reference: str, missing: str) -> None:
    processes = [loads.start(q4_0, q4_0, q4_0, at_once=True, missing=missing) for _ in range(2)]
    for process in processes:
        assert loads.done(process)[0] == [reference] * 3
    assert loads.file().suffix == ".blocks"
    results, said = loads(missing=missing)
    assert results == [reference]
    assert "taken from" in said[-1]


def test_damage_costs_time_only(loads: Loads, reference: str) -> None:
    assert loads()[0] == [reference]
    good = loads.file().read_bytes()
    n_blocks = struct.unpack_from("<7Q", good)[3]
    first_block = (56 + 256 + 8 * n_blocks + 4095) // 4096 * 4096
    places = [*range(0, 56, 8), 56 + 256, len(good) // 2, first_block + 1]
    for place in places:
        file = loads.file()
        bad = bytearray(good)
        bad[place : place + 8] = bytes(b ^ 0xFF for b in bad[place : place + 8])
        file.write_bytes(bad)
        results, said = loads()
        assert results == [reference], place
        assert any("damaged" in s for s in said), place
        if not loads.files():  # found while it was in use
            assert loads()[0] == [reference]
        assert loads.file().stat().st_size == len(good)
    for size in (0, 100, 4096, len(good) - 1):
        os.truncate(loads.file(), size)
        assert loads()[0] == [reference]
        assert loads.file().stat().st_size == len(good)


def test_a_file_that_goes_bad_while_it_is_used(loads: Loads, reference: str) -> None:
    assert loads()[0] == [reference]
    cut = """
from pathlib import Path
(file,) = Path(os.environ["SUPERLLAMA_CACHE"], "repacked").iterdir()
os.truncate(file, 4096)
ctx.seq_remove(0)
again = []
while len(again) < 3:
    ctx.decode([(1000, 1001, 1002)[len(again)]])
    again.append(ctx.logits()[0].copy())
assert np.array_equal(np.stack(again), np.stack(rows))
"""
    results, said = loads(then=cut)
    assert results == [reference]
    assert any("repacked from the model from now on" in s for s in said)


@pytest.mark.parametrize("missing", ["", "tmpfile"])
@pytest.mark.parametrize(
    ("spoiled", "why"),
    [
        ("0,6", "No space left on device"),
        ("9,6", "No space left on device"),
        ("9,7", "Input/output error"),
    ],
)
def test_writes_that_fail(loads: Loads, reference: str, spoiled: str, why: str, missing: str) -> None:
    loads.variables = {"FAULT_WRITES": spoiled}
    results, said = loads(missing=missing)
    assert results == [reference]
    assert sum(why in s for s in said) == 1
    assert loads.files() == []


@pytest.mark.parametrize("missing", ["", "fallocate"])
def test_a_limit_of_file_sizes(loads: Loads, reference: str, missing: str) -> None:
    results, said = loads(missing=missing, wrap=("prlimit", "--fsize=20000000"))
    assert results == [reference]
    assert any("File too large: this process may write 20000000 bytes to a file (ulimit -f)" in s for s in said)
    assert loads.files() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a filesystem")
@pytest.mark.parametrize("missing", ["", "fallocate"])
def test_no_room(loads: Loads, reference: str, missing: str) -> None:
    loads.folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", loads.folder], capture_output=True
    ).returncode:
        pytest.skip("no filesystem can be mounted here")
    try:
        results, said = loads(missing=missing)
        left = loads.files()
    finally:
        subprocess.run(["umount", loads.folder], check=True)
    assert results == [reference]
    (line,) = [s for s in said if "no room in" in s]
    assert f"{loads.folder}/repacked: " in line
    assert "MiB are needed, 20 MiB are free" in line or "MiB are needed, 19 MiB are free" in line
    assert left == []


def test_without_promised_room(loads: Loads, reference: str) -> None:
    results, said = loads(missing="fallocate")
    assert results == [reference]
    assert "written to" in said[-1]


@pytest.mark.parametrize("missing", ["", "tmpfile"])
def test_cancelled_while_writing(loads: Loads, missing: str) -> None:
    begin = time.monotonic()
    (result,), _ = loads(stop="cancel", missing=missing)
    assert result.startswith("CancelledError")
    assert time.monotonic() - begin < 60
    assert loads.files() == []


def test_killed_while_writing(loads: Loads, reference: str) -> None:
    process = loads.start(stop="kill")
    process.wait(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert loads.files() == []


def leftover(loads: Loads) -> Path:
    process = loads.start(stop="kill", missing="tmpfile")
    process.wait(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert loads.file().suffix == ".writing"
    return loads.file()


def test_what_a_killed_writer_left_goes(loads: Loads, reference: str) -> None:
    left = leftover(loads)
    old = left.with_name("0123456789abcdef.blocks.4711")  # of an earlier version, whose writers had no locks
    young = left.with_name("0123456789abcdef.blocks.4712")
    for file in (old, young):
        file.write_bytes(bytes(1000))
    os.utime(old, (0, 0))
    assert loads(missing="tmpfile")[0] == [reference]
    assert not left.exists()
    assert not old.exists()
    assert young.exists()


def test_the_command_removes_it_too(loads: Loads) -> None:
    left = leftover(loads)
    live = left.with_name(".live.writing")
    live.write_bytes(bytes(10))
    script = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", script, live], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        command = [sys.executable, "-m", "superllama", "cache", "list"]
        subprocess.run(command, env=loads.environment(), check=True, capture_output=True)
        assert loads.files() == [live]
        writer.communicate("\n")
    subprocess.run([*command[:-1], "prune"], env=loads.environment(), check=True, capture_output=True)
    assert loads.files() == []


# ---------------------------------------------------------------- private


def plant(file: Path) -> None:
    """Other content, and checksums that would fit anything."""
    data = bytearray(file.read_bytes())
    n_blocks = struct.unpack_from("<7Q", data)[3]
    data[56 + 256 : 56 + 256 + 8 * n_blocks] = bytes(8 * n_blocks)
    for i in range(len(data) // 2, len(data), 18 * 64):
        data[i] ^= 0x55
    file.write_bytes(data)


def others_may_write(file: Path, tmp_path: Path) -> None:
    plant(file)
    file.chmod(0o666)


def group_may_write(file: Path, tmp_path: Path) -> None:
    file.chmod(0o620)


def of_another_user(file: Path, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("gives a file away")
    plant(file)
    os.chown(file, 65534, 65534)


def a_link(file: Path, tmp_path: Path) -> None:
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")


def a_pipe(file: Path, tmp_path: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def checksums_of_zero(file: Path, tmp_path: Path) -> None:
    plant(file)


@pytest.mark.parametrize(
    "change", [others_may_write, group_may_write, of_another_user, a_link, a_pipe, checksums_of_zero]
)
def test_a_file_that_is_not_trusted(
    loads: Loads, reference: str, tmp_path: Path, change: Callable[[Path, Path], None]
) -> None:
    assert loads()[0] == [reference]
    file = loads.file()
    change(file, tmp_path)
    results, said = loads()
    assert results == [reference]
    assert any("is not used" in s for s in said)
    mode = file.lstat()
    assert (stat.S_IMODE(mode.st_mode), mode.st_uid) == (0o600, os.geteuid())
    assert stat.S_ISREG(mode.st_mode)


@pytest.mark.skipif(os.geteuid() != 0, reason="gives a folder away")
@pytest.mark.parametrize("which", ["cache", "repacked"])
def test_a_folder_of_another_user(loads: Loads, reference: str, which: str) -> None:
    folder = loads.folder / "repacked"
    folder.mkdir(parents=True)
    os.chown(folder if which == "repacked" else loads.folder, 65534, 65534)
    results, said = loads()
    assert results == [reference]
    assert sum("is not trusted: it belongs to user 65534" in s for s in said) == 1
    assert loads.files() == []


def test_a_folder_that_others_may_write(loads: Loads, reference: str) -> None:
    folder = loads.folder / "repacked"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert loads()[0] == [reference]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o755


# ---------------------------------------------------------------- the folder


@pytest.mark.parametrize(
    ("variables", "where"),
    [
        ({"SUPERLLAMA_CACHE": "~/named", "HOME": "{tmp}/home"}, "home/named"),
        ({"HOME": "{tmp}/home"}, "home/.cache/superllama"),
        ({"HOME": "{tmp}/home", "XDG_CACHE_HOME": "{tmp}/xdg"}, "xdg/superllama"),
        ({"HOME": "{tmp}/home", "XDG_CACHE_HOME": "relative"}, "home/.cache/superllama"),
        ({"HOME": "{tmp}/home", "XDG_CACHE_HOME": "~/x"}, "home/.cache/superllama"),
        ({"HOME": "/dev/null/home", "TMPDIR": "{tmp}/t"}, "t/superllama-{uid}"),
        ({"HOME": "/proc/home", "TMPDIR": "{tmp}/t"}, "t/superllama-{uid}"),
    ],
)
def test_never_the_working_directory(
    loads: Loads, reference: str, tmp_path: Path, variables: dict[str, str], where: str
) -> None:
    for name in ("home", "t", "work"):
        (tmp_path / name).mkdir()
    values = {name: value.format(tmp=tmp_path) for name, value in variables.items()}
    env = {k: v for k, v in loads.environment().items() if k not in ("HOME", "XDG_CACHE_HOME", "SUPERLLAMA_CACHE")}
    task = {"models": [str(loads.model)], "stock": False, "at_once": False, "stop": "", "check": False, "then": ""}
    command = [sys.executable, "-c", SCRIPT, json.dumps(task)]
    done = subprocess.run(command, env={**env, **values}, cwd=tmp_path / "work", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0] == [reference]
    folder = tmp_path / where.format(uid=os.geteuid()) / "repacked"
    (file,) = folder.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list((tmp_path / "work").iterdir()) == []
    command = [sys.executable, "-m", "superllama", "cache", "list", "--json"]
    listed = subprocess.run(command, env={**env, **values}, cwd=tmp_path / "work", capture_output=True, text=True)
    assert [entry["path"] for entry in json.loads(listed.stdout)["entries"]] == [str(file)]
