"""Smaller model files: llama.cpp's program for that, as a function."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

from ._errors import ModelError
from ._files import open_regular, replaceable
from ._native import ffi
from ._programs import find_program, program_environment

_SAID = re.compile(r"failed to quantize: (.+)")  # the reason; another line of it names the file


def quantize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    type: str = "Q4_K_M",
    *,
    imatrix: str | os.PathLike[str] | None = None,
    allow_requantize: bool = False,
    leave_output_tensor: bool = False,
    pure: bool = False,
    n_threads: int | None = None,
) -> Path:
    """Write a model's file with smaller weights, and return where it is; superllama-quantize has more options.

    `type` is one of llama.cpp's, such as "Q4_K_M" or "Q8_0", in any case. `imatrix` is a file of llama.cpp's program
    of that name, which types of less than 3 bits need. `allow_requantize`: also where the source is quantized already,
    which costs quality. `leave_output_tensor` keeps the output matrix as it is; `pure` makes all of one type.
    A file that is there is replaced once the new one is complete; after an error or Ctrl-C it is as it was.

    Raises: ValueError for a type that there is not; ModelError for what is no model or cannot be made that type, with
    the reason; OSError if the files cannot be read or written.
    """
    names = types()
    if not isinstance(type, str) or type.upper() not in names:
        raise ValueError(f"there is no type {type!r:.40}; there are {', '.join(names)}")
    open_regular(source, ModelError).close()
    to = replaceable(target, ModelError)
    if to.exists() and to.samefile(source):
        raise ModelError(f"{to} cannot be quantized onto itself: name another file")
    asked = {
        "--allow-requantize": allow_requantize,
        "--leave-output-tensor": leave_output_tensor,
        "--pure": pure,
    }
    flags = [flag for flag, is_set in asked.items() if is_set]
    if imatrix is not None:
        open_regular(imatrix, ModelError).close()
        flags += ["--imatrix", os.fspath(imatrix)]
    program = find_program("llama-quantize")
    with tempfile.TemporaryDirectory(prefix=f".{to.name}-", dir=to.parent) as folder:
        made = Path(folder) / to.name
        command = [program, *flags, source, made, type.upper(), *([n_threads] if n_threads else [])]
        done = subprocess.run(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
            env=program_environment(program, os.environ),
        )  # fmt: skip
        if done.returncode != 0:
            said = _SAID.findall(done.stdout) or done.stdout.strip().splitlines()[-1:] or ["it said nothing"]
            raise ModelError(f"{os.fspath(source)} cannot be made {type.upper()}: {said[-1]}")
        made.replace(to)
    return to


def types() -> list[str]:
    """The names that quantize() knows."""
    names = [re.sub("^LLAMA_FTYPE_(MOSTLY_|ALL_)?", "", name) for name in ffi.typeof("enum llama_ftype").relements]
    return sorted(set(names) - {"GUESSED", "NVFP4"})  # no type, and one that files come with
