"""The library: loaded once, its log handed to Python's logging, its errors kept for our messages.

`ffi` and `lib` are cffi's; every other module takes them from here. cffi releases Python's lock in each call.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

from ._backends import backend_files
from ._neighbours import apart, load_apart
from ._openmp import short_spins
from ._programs import find_bin_dir
from ._words import in_python

if TYPE_CHECKING:
    ffi: Any
    lib: Any
    _crowded: bool
else:
    if sys.platform == "win32" and (bin_dir := find_bin_dir()):
        os.add_dll_directory(str(bin_dir))
    try:
        with short_spins(), apart() as _crowded:
            from ._ffi import ffi, lib
    except ImportError as e:
        raise ImportError(
            f"superllama's library cannot be loaded: {e}. The package is not built or was moved; "
            "install it again: python -m pip install --force-reinstall superllama"
        ) from e

log = logging.getLogger("superllama")
log.addHandler(logging.NullHandler())

# ---------------------------------------------------------------- callbacks


class _Kept(threading.local):
    error: BaseException | None = None  # what a callback of the library raised in this thread


_kept = _Kept()


def keep_error(kind: Any, error: BaseException, trace: TracebackType) -> None:
    """The `onerror` of every callback. Python's way back to the caller is through the library, which knows no
    exceptions: Ctrl-C during a call is raised in whatever callback runs next, and would end there."""
    if _kept.error is None:
        _kept.error = error


def raise_kept() -> None:
    """Raise what a callback of this thread left: to be called after each call into the library."""
    if error := _kept.error:
        _kept.error = None
        raise error


@ffi.def_extern(name="superllama_py_interrupted", error=1, onerror=keep_error)  # type: ignore[untyped-decorator]
def _on_wait() -> int:
    """Asked by a computation now and then, so that Python's main thread hears Ctrl-C: it is raised here."""
    return 0


# ---------------------------------------------------------------- log

_LEVELS = {
    lib.GGML_LOG_LEVEL_DEBUG: logging.DEBUG,
    lib.GGML_LOG_LEVEL_INFO: logging.INFO,
    lib.GGML_LOG_LEVEL_WARN: logging.WARNING,
    lib.GGML_LOG_LEVEL_ERROR: logging.ERROR,
}


class _ThreadLog(threading.local):
    def __init__(self) -> None:
        self.level = logging.INFO
        self.text = ""  # of a line that is not finished
        self.errors: collections.deque[str] = collections.deque(maxlen=8)


_thread = _ThreadLog()


@ffi.def_extern(name="superllama_py_log", onerror=keep_error)  # type: ignore[untyped-decorator]
def _on_log(level: int, text: Any, user_data: Any) -> None:
    """A piece of a line from any thread of the library; whole lines go to the logger."""
    if level != lib.GGML_LOG_LEVEL_CONT:
        _thread.level = _LEVELS.get(level, logging.INFO)
    *lines, _thread.text = (_thread.text + ffi.string(text).decode("utf-8", "replace")).split("\n")
    failed = _thread.level >= logging.ERROR
    if not failed and not log.isEnabledFor(_thread.level):
        return  # most lines are for nobody
    for line in map(in_python, filter(str.strip, lines)):
        if failed:
            _thread.errors.append(line.strip())
        log.log(_thread.level, "%s", line)


@contextlib.contextmanager
def collected_errors() -> Iterator[collections.deque[str]]:
    """The error lines that the library logs from this thread inside the with block; the last eight."""
    _thread.errors.clear()
    try:
        yield _thread.errors
    finally:
        raise_kept()


def reason(errors: collections.deque[str], fallback: str) -> str:
    """The most telling of the logged lines, without the names of the functions that logged it."""
    lines = [re.sub(r"^(\w+: )+(error loading model: )?", "", line) for line in errors]
    lines = [
        line for line in lines if not re.fullmatch(r"failed to (load|decode|encode)( model)?(, ret = -?\d+)?", line)
    ]
    # a device that refuses an allocation is not the end, layers make room: what ended it says more
    for line in lines:
        if ended := re.fullmatch(r"failed to initialize the context: (?!failed to)(.+)", line):
            return ended[1]
    return lines[0] if lines else fallback


# ---------------------------------------------------------------- start and end


def _end() -> None:
    """No call into Python once the interpreter has gone: a thread that asks for its lock then is ended where it is, and
    inside the library that ends the process."""
    lib.llama_log_set(ffi.addressof(lib, "superllama_py_log_nothing"), ffi.NULL)
    if threading.active_count() > 1:
        time.sleep(0.05)  # what is on its way from another thread has its turn


def _start() -> None:
    lib.llama_log_set(lib.superllama_py_log, ffi.NULL)
    atexit.register(_end)  # registered first, so it runs last
    with short_spins():
        for folder in [*(file.parent for file in backend_files()), find_bin_dir()]:
            if folder:
                if _crowded:
                    load_apart(folder)
                lib.ggml_backend_load_all_from_path(os.fsencode(folder))
    lib.llama_backend_init()


_start()

# ---------------------------------------------------------------- small helpers


def text(pointer: Any) -> str:
    """A C string as str; "" for NULL."""
    return ffi.string(pointer).decode("utf-8", "replace") if pointer else ""


def version() -> str:
    """The version of the native library."""
    return text(lib.superllama_version())


def upstream_build() -> str:
    """The build of llama.cpp that the library is made from, such as ``b11549``."""
    return text(lib.superllama_upstream_build())


def last_error() -> str:
    """Why the last call of a superllama_* function in this thread failed."""
    return in_python(text(lib.superllama_last_error()))
