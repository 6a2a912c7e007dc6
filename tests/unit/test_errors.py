"""Errors: one base class, texts that say what to try, and what is wrong with a file before it is loaded."""

from __future__ import annotations

import concurrent.futures
import copy
import logging
import multiprocessing
import pickle
from pathlib import Path

import pytest

import superllama
from superllama._generation import TextStream
from superllama._gguf import check_gguf
from superllama._native import collected_errors, ffi, lib, log, reason

GGUF = b"GGUF" + (3).to_bytes(4, "little") + bytes(16)


@pytest.mark.parametrize("name", [n for n in superllama.__all__ if n.endswith("Error")])
def test_every_error_is_an_error(name: str) -> None:
    assert issubclass(getattr(superllama, name), superllama.Error)


@pytest.mark.parametrize("name", [n for n in superllama.__all__ if n.endswith("Error")])
def test_every_error_pickles(name: str) -> None:
    """With its type, its text and its attributes, those that a caller added included."""
    kind = getattr(superllama, name)
    error = kind("text", 5, 3) if name == "PromptTooLongError" else kind("text")
    error.mine = "note"
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert str(again) == "text"
        assert again.args == error.args
        assert again.__dict__ == error.__dict__


def raising(path: str) -> None:
    """In another process."""
    with superllama.Context(path, n_ctx=256) as ctx:
        ctx.decode([5] * 600)


def test_errors_come_out_of_a_process_pool(tiny_model: Path) -> None:
    pool = concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with pool, pytest.raises(superllama.PromptTooLongError, match="600 tokens") as e:
        pool.submit(raising, str(tiny_model)).result(120)
    assert (e.value.n_tokens, e.value.n_room) == (600, 256)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "is empty"),
        (b"hello, this is no model at all", "begins with b'hell'"),
        (b"GGUF\x03\x00", "cut off: 6 bytes"),
        (b"GGUF" + (1).to_bytes(4, "little") + bytes(16), "GGUF version 1"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"PK\x03\x04" + bytes(30), "zip"),
        (bytes(8) + b'{"__metadata__"', "safetensors"),
        (b"FUGU" + bytes(20), "byte order"),
    ],
)
def test_files_that_are_no_models(tmp_path: Path, content: bytes, text: str) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    with pytest.raises(superllama.ModelError, match=text) as e:
        check_gguf(file)
    assert str(file) in str(e.value)


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "inside.gguf").write_bytes(GGUF)
    with pytest.raises(superllama.ModelError, match=r"is a folder.*inside\.gguf"):
        check_gguf(tmp_path)
    with pytest.raises(superllama.ModelError, match="does not exist"):
        check_gguf(tmp_path / "missing.gguf")
    with pytest.raises(superllama.ModelError, match="null"):
        check_gguf("a\0b")


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:  # as root, a file's mode refuses nothing
        raise PermissionError(13, "Permission denied")

    (tmp_path / "secret.gguf").write_bytes(GGUF)
    monkeypatch.setattr("os.open", refuse)
    with pytest.raises(superllama.ModelError, match=r"cannot open .*secret\.gguf.*: Permission denied"):
        check_gguf(tmp_path / "secret.gguf")


def test_a_good_header_passes(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(GGUF)
    assert check_gguf(str(file)) == file


def test_library_log_goes_to_logging_by_level(caplog: pytest.LogCaptureFixture, tiny_model: Path) -> None:
    with caplog.at_level(logging.INFO, logger="superllama"):
        superllama.Model(tiny_model).close()
    assert any("llama" in record.message for record in caplog.records)
    assert all(record.levelno >= logging.INFO and "\n" not in record.message for record in caplog.records)


def test_the_log_is_quiet_by_default(run_python: object, tiny_model: Path) -> None:
    script = "import sys, superllama; superllama.Model(sys.argv[1]).close(); print('done')"
    done = run_python(script, tiny_model)  # type: ignore[operator]
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert log.level == logging.NOTSET


def test_fragments_of_a_line_are_put_together(caplog: pytest.LogCaptureFixture) -> None:
    on_log = lib.superllama_py_log
    with caplog.at_level(logging.DEBUG, logger="superllama"), collected_errors() as errors:
        on_log(lib.GGML_LOG_LEVEL_ERROR, b"load: first ", ffi.NULL)
        on_log(lib.GGML_LOG_LEVEL_CONT, b"half\nsecond", ffi.NULL)
        on_log(lib.GGML_LOG_LEVEL_CONT, b" \xff line\n", ffi.NULL)
        assert list(errors) == ["load: first half", "second � line"]
    assert [r.message for r in caplog.records] == ["load: first half", "second � line"]
    assert reason(errors, "none") == "first half"
    with collected_errors() as errors:
        assert reason(errors, "none") == "none"


# ---------------------------------------------------------------- bytes to text


def feed(stream: TextStream, *parts: bytes) -> list[str]:
    return [stream.feed(part) for part in parts] + [stream.feed(b"", final=True)]


def test_characters_are_whole() -> None:
    assert feed(TextStream(), b"a\xe2", b"\x82", b"\xac", b"b") == ["a", "", "€", "b", ""]
    assert feed(TextStream(), b"a\xe2\x82") == ["a", "�"]
    assert feed(TextStream(), b"\xff", b"x") == ["�", "x", ""]


def test_stop_strings_across_pieces() -> None:
    stream = TextStream(["STOP", "\n\n"])
    assert feed(stream, b"go S", b"TO", b"N ST", b"OP more", b"x") == ["go ", "", "STON ", "", "", ""]
    assert stream.stopped
    assert feed(TextStream(["ab", "abc"]), b"xa", b"bc") == ["x", "", ""]


def test_what_was_held_back_comes_when_it_is_no_stop_string() -> None:
    stream = TextStream(["</end>"])
    assert feed(stream, b"1 </e", b"nd", b"less>") == ["1 ", "", "</endless>", ""]
    assert feed(TextStream(["STOP"]), b"ST") == ["", "ST"]
    assert not stream.stopped
