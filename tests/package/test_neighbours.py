"""Other libraries in the same process: numpy, a user of OpenMP, and another llama.cpp, loaded before and after ours."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from running import Runner
from symbols import exported, libraries

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="how ELF libraries find names")

# arguments: the model, then what to load before our package and after it, as JSON lists of [path, for everyone?]
SCRIPT = """
import ctypes, json, os, sys

def load(neighbours):
    for path, everyone in neighbours:
        if path == "numpy":
            import numpy
            numpy.ones((300, 300)) @ numpy.ones((300, 300))
        else:
            library = ctypes.CDLL(path, mode=os.RTLD_NOW | (os.RTLD_GLOBAL if everyone else os.RTLD_LOCAL))
            if path.endswith("openmp.so"):
                assert library.count_threads() >= 1

load(json.loads(sys.argv[2]))
import superllama
superllama.Model  # loads the library: the import alone does not
load(json.loads(sys.argv[3]))
with superllama.Model(sys.argv[1]) as model, superllama.Context(model, n_ctx=128) as ctx:
    tokens = [piece.token for piece in ctx.generate("once upon a time", max_tokens=6, temperature=0)]
    assert len(tokens) == 6
load(json.loads(sys.argv[2]) + json.loads(sys.argv[3]))
try:
    superllama.Model("/no/such/model.gguf")
except superllama.Error as e:
    assert "/no/such/model.gguf" in str(e)
print(tokens)
"""


def compile_library(source: str, path: Path, *flags: str) -> str:
    if shutil.which("cc") is None:
        pytest.skip("there is no C compiler")
    path.with_suffix(".c").write_text(source)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", path, path.with_suffix(".c"), *flags], check=True)
    return str(path)


@pytest.fixture(scope="module")
def openmp(tmp_path_factory: pytest.TempPathFactory) -> str:
    """As PyTorch does it: threads of OpenMP that are up before ours, and stay."""
    source = """
        int count_threads(void) { int n = 0;
        #pragma omp parallel reduction(+ : n)
            n += 1;
            return n; }"""
    return compile_library(source, tmp_path_factory.mktemp("openmp") / "openmp.so", "-fopenmp")


@pytest.fixture(scope="module")
def other_llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Another llama.cpp: every name that ours have, C and C++, and each ends the process when it is called."""
    names = {name for path in libraries() for name in exported(path) if re.match(r"(llama|ggml|gguf|mtmd)_|_Z", name)}
    names = {name for name in names if not re.match("_ZT[VIS]", name)}
    assert {"llama_decode", "ggml_init", "gguf_init_from_file"} <= names
    body = "".join(f"void {name}(void) {{ abort(); }}\n" for name in sorted(names))
    declared = '#include <stdlib.h>\n#pragma GCC diagnostic ignored "-Wbuiltin-declaration-mismatch"\n'
    return compile_library(declared + body, tmp_path_factory.mktemp("other") / "libllama.so", "-w")


@pytest.mark.parametrize("everyone", [False, True], ids=["local", "global"])
@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_another_llama(first: str, everyone: bool, tiny_model: Path, other_llama: str, run_python: Runner) -> None:
    theirs = [[other_llama, everyone]]
    before, after = ([], theirs) if first == "ours" else (theirs, [])
    done = run_python(SCRIPT, tiny_model, json.dumps(before), json.dumps(after))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_numpy_and_openmp(first: str, tiny_model: Path, openmp: str, run_python: Runner) -> None:
    theirs = [["numpy", False], [openmp, True]]
    before, after = ([], theirs) if first == "ours" else (theirs, [])
    done = run_python(SCRIPT, tiny_model, json.dumps(before), json.dumps(after))
    assert done.returncode == 0, done.stderr
