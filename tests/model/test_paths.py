"""Paths that are no files, links, and more files than the process may open: errors at once that name what is wrong."""

from __future__ import annotations

import os
import re
import socket
import sys
from pathlib import Path

import pytest
from running import Runner

import superllama

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX processes")


# ---------------------------------------------------------------- paths that are no files


@pytest.fixture(params=["FIFO", "socket", "device", "folder"])
def no_file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    path = tmp_path / "x"
    if request.param == "FIFO":
        os.mkfifo(path)
    elif request.param == "socket":
        monkeypatch.chdir(tmp_path)  # the names of sockets are short
        server = socket.socket(socket.AF_UNIX)
        server.bind("x")
        request.addfinalizer(server.close)
    elif request.param == "folder":
        path.mkdir()
    else:
        path = Path("/dev/null")
    return request.param, path


def test_a_path_that_is_no_file_is_an_error_at_once(
    no_file: tuple[str, Path], model: superllama.Model, ctx: superllama.Context
) -> None:
    kind, path = no_file
    for use in (
        superllama.Model,
        superllama.Context,
        superllama.plan,
        model.load_lora,
        ctx.state_load_file,
        ctx.state_save_file,
    ):
        with pytest.raises((superllama.ModelError, superllama.StateError), match=kind):
            use(path)
    assert path.exists()  # nothing took its place


def test_another_part_of_a_model_that_is_no_file(tiny_model: Path, tmp_path: Path) -> None:
    first = tmp_path / "m-00001-of-00002.gguf"
    first.write_bytes(tiny_model.read_bytes())
    os.mkfifo(tmp_path / "m-00002-of-00002.gguf")
    with pytest.raises(superllama.ModelError, match=r"00002-of-00002\.gguf is a FIFO"):
        superllama.Model(first)


def test_a_link_to_a_state_stays_a_link(ctx: superllama.Context, tmp_path: Path) -> None:
    ctx.decode([5, 6])
    (tmp_path / "link").symlink_to(tmp_path / "real")
    ctx.state_save_file(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    ctx.state_load_file(tmp_path / "real")
    assert ctx.seq_pos_max() == 1


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("who", ["Python", "the library"])
def test_a_limit_of_open_files_is_named(tiny_model: Path, run_python: Runner, who: str) -> None:
    """The library opens more files than Python does before it: the parts of a split model."""
    script = """
import os, pathlib, resource, sys, superllama
superllama.Model(sys.argv[1]).close()  # what the first load opens besides is not what is asked here
if sys.argv[2] == "the library":
    superllama._model.check_gguf = pathlib.Path
n = os.open(os.devnull, os.O_RDONLY) + 1
resource.setrlimit(resource.RLIMIT_NOFILE, (n, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    superllama.Model(sys.argv[1])
except superllama.ModelError as e:
    print(str(e).replace(f" {n} ", " N "))
"""
    done = run_python(script, tiny_model, who)
    assert done.returncode == 0, done.stderr
    assert re.search(r"Too many open files\)?; the limit of this process is N open files; raise it", done.stdout)
