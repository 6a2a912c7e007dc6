"""Our libraries show llama's, ggml's and our own names, nothing of the C++ library or of what is compiled into them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from symbols import exported, libraries, needed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="symbols of ELF libraries")

# what a name begins with: of C; of C++ in the global namespace or in one of ours; a table of such a class
PREFIX = r"(ggml|gguf|llama|llm|LLM|superllama|mtmd|clip|common|quantize|dequantize|iq[23]xs)_"
C = re.compile(PREFIX + r"|PyInit__ffi$")
OURS = PREFIX + r"|fs_|string_|glob_match|json_schema_to_grammar|parse_cpu_|postprocess_cpu_|set_process_priority"
CPP = re.compile(
    rf"_Z(T[VIS])?N?K?\d+({OURS})|_Z(T[VIS])?NK?(7console|8hf_cache|5jinja|10superllama)\d|_ZNK?(5jinja|7console|10superllama)[A-Z]"
)


@pytest.mark.parametrize("library", libraries(), ids=lambda path: path.name)
def test_only_our_names_are_shown(library: Path) -> None:
    names = exported(library)
    assert names
    foreign = [name for name in names if not (CPP if name.startswith("_Z") else C).match(name)]
    assert foreign == []


@pytest.mark.parametrize("library", libraries(), ids=lambda path: path.name)
def test_nothing_of_the_cpp_library_is_shown(library: Path) -> None:
    """Said once more without our lists: std is St or S[a-z] in mangled names."""
    std = re.compile(
        r"_Z(T[VISCT]|GV|GR|Z)?N?[KVRO]*S[a-z]|_ZN?K?\d+(__gnu_cxx|__cxxabiv1|httplib|nlohmann)|__cxa|_Unwind"
    )
    assert [name for name in exported(library) if std.match(name)] == []


def test_libllama_needs_no_name_of_a_backend() -> None:
    """Backends are loaded at run time in portable builds: what only they define cannot be linked to."""
    ggml = {name for path in libraries() if re.search(r"ggml(-base)?\.so$", path.name) for name in exported(path)}
    assert ggml
    for path in libraries():
        if re.search(r"superllama-(llama|mtmd)|_ffi", path.name):
            missing = [n for n in needed(path) if re.match("(ggml|gguf|quantize)_", n) and n not in ggml]
            assert missing == [], path.name
