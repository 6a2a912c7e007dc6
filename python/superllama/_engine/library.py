"""The engine's shared library: loaded when the first engine is made, for it brings the server with it."""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

from .._errors import Error, ModelError
from .._native import ffi
from .._programs import find_bin_dir

_POINTER = ctypes.c_void_p

# name -> what it returns, what it takes; see include/superllama-engine.h
_FUNCTIONS = {
    "superllama_engine_error": (ctypes.c_char_p, []),
    "superllama_engine_flags": (ctypes.c_char_p, []),
    "superllama_engine_draft_type": (ctypes.c_char_p, [ctypes.c_char_p]),
    "superllama_engine_projector_bytes": (ctypes.c_int64, [ctypes.c_char_p]),
    "superllama_chat_template_make": (_POINTER, [_POINTER, ctypes.c_char_p]),
    "superllama_chat_template_apply": (ctypes.c_char_p, [_POINTER, ctypes.c_char_p, ctypes.c_size_t]),
    "superllama_chat_template_free": (None, [_POINTER]),
    "superllama_engine_start": (_POINTER, [ctypes.c_int32, ctypes.POINTER(ctypes.c_char_p), _POINTER, _POINTER]),
    "superllama_engine_stop": (None, [_POINTER]),
    "superllama_engine_hold": (_POINTER, [_POINTER]),
    "superllama_engine_release": (None, [_POINTER]),
    "superllama_engine_submit": (_POINTER, [_POINTER, *[ctypes.c_char_p] * 3, ctypes.c_size_t]),
    "superllama_engine_submit_with": (
        _POINTER,
        [_POINTER, *[ctypes.c_char_p] * 3, ctypes.c_size_t, _POINTER, _POINTER],
    ),
    "superllama_request_next": (
        ctypes.c_int,
        [_POINTER, ctypes.c_int32, ctypes.POINTER(_POINTER), ctypes.POINTER(ctypes.c_size_t)],
    ),
    "superllama_request_status": (ctypes.c_int, [_POINTER]),
    "superllama_request_cancel": (None, [_POINTER]),
    "superllama_request_free": (None, [_POINTER]),
}


@functools.cache
def library() -> ctypes.CDLL:
    """The library with the types of its functions. ctypes releases Python's lock in each call.

    Raises: Error if it is not there.
    """
    path = _find()
    if path is None:
        raise Error("the engine's library is not installed; install superllama again: pip install --force-reinstall")
    loaded = ctypes.CDLL(str(path))
    for name, (returns, takes) in _FUNCTIONS.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = returns, takes
    return loaded


def _find() -> Path | None:
    bin_dir = find_bin_dir()
    folders = [bin_dir.parent / "lib", bin_dir] if bin_dir else []
    return next((file for folder in folders for file in folder.glob("*superllama-engine.*")), None)


def last_error() -> str:
    """Why the last call in this thread failed."""
    return (library().superllama_engine_error() or b"").decode("utf-8", "replace")


@functools.cache
def flags() -> dict[str, bool]:
    """The names of the engine's flags, and whether each takes a value."""
    lines = library().superllama_engine_flags().decode()
    return {name.rstrip("="): name.endswith("=") for name in lines.split()}


def draft_type(path: str | os.PathLike[str]) -> str:
    """How the model in this file drafts for another one: a value of --spec-type."""
    return bytes(library().superllama_engine_draft_type(os.fsencode(path))).decode()


def projector_bytes(path: str | os.PathLike[str]) -> int:
    """What the projector in this file takes of the host's memory. Raises: ModelError if it cannot be read."""
    found = int(library().superllama_engine_projector_bytes(os.fsencode(path)))
    if found < 0:
        raise ModelError(last_error())
    return found


def address(pointer: object) -> int:
    """A pointer of cffi's as a number, for ctypes."""
    return int(ffi.cast("uintptr_t", pointer))
