"""Weights that an RPC server has in files of its own: a client names them by hash, and what is wrong is never used."""

from __future__ import annotations

import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny_model as tiny
from bench.counting import Counter
from fuzz.rpc_messages import GET, SET_HASH, Connection, Tensor, fnv
from rpc_devices import PRELUDE, Server, rpc_server
from running import Runner

from superllama._programs import find_program

N_EMBD, N_FF = 256, 512


pytestmark = pytest.mark.usefixtures("no_gpu")


def write_model(path: Path, seed: int = 1) -> Path:
    """A llama of 10 MB: large enough that its weights, and not its graphs, are what crosses a network."""
    rng = np.random.default_rng(seed)
    w = tiny.llama_writer(path, N_EMBD, tiny.N_LAYER, N_FF)
    for name, shape in tiny.llama_tensors(N_EMBD, tiny.N_LAYER, N_FF):
        data = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) * 0.1
        w.add_tensor(name, data.astype(np.float32))
    return tiny.finish(w, path)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("rpc") / "model.gguf")


LOAD = (
    PRELUDE
    + """
how = sys.argv[4]
if how == "static":
    model = superllama.Model(path, n_gpu_layers=99)
    ctx = superllama.Context(model, n_ctx=64, n_threads=1)
else:
    model, ctx = open_model()
ctx.decode(model.tokenize(PROMPT))
if how == "moves":
    for budget in (0, "1GiB"):
        model.set_budget(vram=budget)
        ctx.decode([1])
        print(on_device(), file=sys.stderr)
print(json.dumps(greedy(ctx, 4)))
"""
)


def load(run_python: Runner, server: Server, path: Path, how: str) -> tuple[str, int]:
    """What it generates, and the bytes that crossed."""
    with Counter(server.endpoint) as counter:
        done = run_python(LOAD, path, counter.endpoint, server.serving_pid(), how)
    assert done.returncode == 0, done.stderr
    return done.stdout, counter.total


@pytest.mark.parametrize("how", ["static", "dynamic", "moves"])
def test_weights_that_are_there_are_not_sent(how: str, model_file: Path, run_python: Runner, tmp_path: Path) -> None:
    size = model_file.stat().st_size
    with rpc_server() as plain:
        expected, n_plain = load(run_python, plain, model_file, how)
    assert n_plain > size * (1.8 if how == "moves" else 0.9)
    environment = {"SUPERLLAMA_CACHE": str(tmp_path / "cache")}
    with rpc_server(1, "--model-dir", model_file.parent, **environment) as server:
        for _ in range(2):
            found, n_bytes = load(run_python, server, model_file, how)
            assert found == expected
            assert n_bytes < n_plain * 0.1  # graphs, states, norms


# ------------------------------------------------------------------------------------------ one by one


def experts(path: Path) -> np.ndarray:
    """A file with one tensor of eight matrices of 16 KiB each."""
    w = gguf.GGUFWriter(path, "llama")
    data = np.random.default_rng(7).standard_normal((8, 64, 64)).astype(np.float32)
    w.add_tensor("blk.0.ffn_up_exps.weight", data)
    tiny.finish(w, path)
    return data


def ask(connection: Connection, data: bytes) -> bytes | None:
    """What a server puts into a buffer for the hash of these bytes; None: it has none such."""
    buffer, base = connection.buffer(1 << 20)
    tensor = Tensor(1, buffer, base, (len(data) // 4, 1, 1, 1))
    if connection.ask(SET_HASH, tensor.pack() + struct.pack("<QQ", 0, fnv(data))) != b"\1":
        return None
    return connection.ask(GET, tensor.pack() + struct.pack("<QQ", 0, len(data)))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("SUPERLLAMA_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "models"
    path.mkdir()
    yield path


def test_experts_are_found_one_by_one(folder: Path) -> None:
    data = experts(folder / "a.gguf")
    with rpc_server(1, "--model-dir", folder) as server:
        connection = Connection(server.endpoint)
        for wanted in (data, data[3], data[7]):
            assert ask(connection, wanted.tobytes()) == wanted.tobytes()
        assert ask(connection, data[1:3].tobytes()) is None
        assert ask(connection, b"\2" * 65536) is None


def test_what_a_server_says_of_itself(folder: Path) -> None:
    """In a byte that upstream's clients do not look at, and only where there is something to be asked for."""
    experts(folder / "a.gguf")
    for flags, said in (((), 0), (("--model-dir", folder), 1)):
        with rpc_server(1, *flags) as server:
            assert Connection(server.endpoint).hello[3] == said


def test_a_file_that_changed_is_not_believed(folder: Path, tmp_path: Path) -> None:
    """Not by its size and time alone: what is read is hashed again. The other file that has the bytes serves on."""
    data = experts(folder / "a.gguf")
    (folder / "b.gguf").write_bytes((folder / "a.gguf").read_bytes())
    log = tmp_path / "log"
    with rpc_server(1, "--model-dir", folder, log=log) as server:
        connection = Connection(server.endpoint)
        assert ask(connection, data[3].tobytes()) == data[3].tobytes()
        for name in ("a.gguf", "b.gguf"):
            file = folder / name
            before = file.stat()
            content = bytearray(file.read_bytes())
            content[content.index(data[3].tobytes())] ^= 1
            with file.open("r+b") as out:
                out.write(content)
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
            expected = data[3].tobytes() if name == "a.gguf" else None
            assert ask(connection, data[3].tobytes()) == expected
    assert log.read_text().count("its bytes are not what they were") == 2


def test_a_file_that_grew_is_not_used(folder: Path, tmp_path: Path) -> None:
    data = experts(folder / "a.gguf")
    log = tmp_path / "log"
    with rpc_server(1, "--model-dir", folder, log=log) as server:
        connection = Connection(server.endpoint)
        with (folder / "a.gguf").open("ab") as file:
            file.write(b"x")
        assert ask(connection, data[3].tobytes()) is None
    assert "a.gguf is not used any more: it was changed" in log.read_text()


def test_files_that_are_no_models_are_passed_over(folder: Path, tmp_path: Path) -> None:
    data = experts(tmp_path / "elsewhere.gguf")
    content = (tmp_path / "elsewhere.gguf").read_bytes()
    (folder / "link.gguf").symlink_to(tmp_path / "elsewhere.gguf")
    (folder / "circle").symlink_to(folder)
    (folder / "nowhere.gguf").symlink_to(tmp_path / "nothing")
    (folder / "empty.gguf").touch()
    (folder / "words.gguf").write_text("no model")
    (folder / "cut.gguf").write_bytes(content[:-4096])
    os.mkfifo(folder / "fifo.gguf")
    (folder / "folder.gguf").mkdir()
    (folder / "notes.txt").write_text("no model")
    log = tmp_path / "log"
    with rpc_server(1, "--model-dir", folder, log=log) as server:
        assert ask(Connection(server.endpoint), data[0].tobytes()) == data[0].tobytes()
    said = log.read_text()
    assert "1 in " in said
    for name in ("nowhere", "empty", "words", "cut", "fifo", "folder"):
        assert f"{name}.gguf is passed over" in said
    assert "it is cut off" in said
    assert "notes.txt" not in said


def test_a_file_is_looked_through_once(folder: Path, tmp_path: Path) -> None:
    data = experts(folder / "a.gguf")
    index = tmp_path / "cache" / "rpc-weights"

    def looks() -> bool:
        log = tmp_path / "log"
        log.write_text("")
        with rpc_server(1, "--model-dir", folder, log=log) as server:
            assert ask(Connection(server.endpoint), data[5].tobytes()) == data[5].tobytes()
        return "looking through" in log.read_text()

    assert looks()
    assert not looks()
    (kept,) = index.iterdir()
    kept.chmod(0o600)
    broken = bytearray(kept.read_bytes())
    broken[100] ^= 1
    kept.write_bytes(broken)
    assert looks()
    assert not looks()
    os.utime(folder / "a.gguf", (1, 1))
    assert looks()


@pytest.mark.parametrize(
    ("value", "said"),
    [(["/no/such/folder"], "cannot read the folder of models /no/such/folder"), ([], "wants a value")],
)
def test_a_folder_that_is_not_there(value: list[str], said: str) -> None:
    command = [find_program("ggml-rpc-server"), "--model-dir", *value]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert said in done.stderr


def test_a_cache_that_cannot_be_written(folder: Path, tmp_path: Path) -> None:
    data = experts(folder / "a.gguf")
    log = tmp_path / "log"
    (tmp_path / "cache").write_text("no folder")
    with rpc_server(1, "--model-dir", folder, log=log) as server:
        assert ask(Connection(server.endpoint), data[5].tobytes()) == data[5].tobytes()
    assert "will be read again next time" in log.read_text()
