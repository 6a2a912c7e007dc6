"""Write python/superllama/_ffi.cdef.txt: the declarations of the C API that the Python binding may call.

    python tools/gen_cdef.py            write it from the headers of the patched tree
    python tools/gen_cdef.py --check    exit with 1 if the committed file is not what the headers say

The text is committed, so that a build needs no preprocessor step and a new pin shows its API changes as a
readable diff. Everything that llama.h and superllama.h declare is kept, less what is deprecated; of ggml
only what those declarations mention and what FROM_GGML names.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "python" / "superllama" / "_ffi.cdef.txt"
WHOLE = ("llama.h", "superllama.h", "superllama-params.h")

FROM_GGML = re.compile(
    r"(struct gguf_context|typedef struct ggml_(threadpool|backend_reg|backend_device|backend_buffer_type) \* \w+"
    r"|enum ggml_(type|log_level|numa_strategy|backend_dev_type) \{.*\}"
    r"|typedef .*\(\* ?(ggml_log_callback|ggml_abort_callback|ggml_backend_sched_eval_callback)\)\(.*\)"
    r"|.*\bggml_(type_name|row_size|backend_load_all_from_path|backend_buft_name|backend_(reg|dev)_(count|get|name)"
    r"|backend_dev_(description|memory|type|by_name|by_type|backend_reg|buffer_type)) ?\(.*\))$"
)
WITHOUT = re.compile(r"deprecated|ggml_opt_|llama_opt_|\.\.\.")  # training is not part of the package

# the functions that the library calls in Python (_native.py, _model.py)
CALLBACKS = """
extern "Python" void superllama_py_log(enum ggml_log_level level, const char * text, void * user_data);
extern "Python" bool superllama_py_progress(float progress, void * user_data);
extern "Python" int superllama_py_interrupted(void);
"""
# the functions of _ffi.csrc.c
HELPERS = """
void superllama_py_log_nothing(enum ggml_log_level level, const char * text, void * user_data);
struct superllama_py_abort { int set; int listens; int64_t next_us; };
bool superllama_py_abort_if_set(void * data);
enum { SUPERLLAMA_PY_CONTRADICTION = -2 };
llama_token superllama_py_sample(
    struct llama_sampler * chain, struct llama_sampler * grammar, struct llama_context * ctx, int32_t idx);
enum ggml_type superllama_py_main_type(const char * path);
"""


def preprocessed(tree: Path) -> str:
    """The text of superllama.h and all that it includes; only lines from WHOLE and from ggml's headers."""
    includes = [ROOT / "include", tree / "include", tree / "ggml" / "include"]
    command = ["cc", "-E", *(f"-I{folder}" for folder in includes), str(ROOT / "include" / "superllama.h")]
    env = dict(os.environ, LC_ALL="C")
    text = subprocess.run(command, check=True, capture_output=True, text=True, env=env)
    kept, origin = [], ""
    for line in text.stdout.splitlines():
        if marker := re.match(r'# \d+ "([^"]*)"', line):
            origin = Path(marker[1]).name if str(ROOT) in str(Path(marker[1]).resolve()) else ""
        elif origin:
            kept.append(f"\x01{origin}\x01 {line}" if line.strip() else "")
    return "\n".join(kept)


def declarations(text: str) -> dict[str, None]:
    """Split at the semicolons outside braces, keep what the binding uses, in order and once."""
    found: dict[str, None] = {}
    for part in re.findall(r"(?:[^;{}]|\{(?:[^{}]|\{[^{}]*\})*\})+;", text):
        origin = re.search("\x01(.*?)\x01", part)
        code = re.sub("\x01.*?\x01", "", part)
        code = " ".join(code.split()).removesuffix(";").strip()
        deprecated = WITHOUT.search(code)
        code = re.sub(r"__attribute__ ?\(\((?:[^()]|\([^()]*\))*\)\)|\bextern\b", "", code).strip()
        if origin and not deprecated and (origin[1] in WHOLE or FROM_GGML.match(code)):
            found[re.sub(r"\s+", " ", code).strip()] = None
    return found


def readable(code: str) -> str:
    """One declaration as text, with the members of a struct or an enum on lines of their own."""
    code = re.sub(r"\(\s+", "(", code.replace("_Bool", "bool").replace(" )", ")"))
    if code.startswith("enum") and "{" in code:
        code = code.replace(", ", ",\n").replace(", }", " }")
    code = re.sub(r" ?\}", "\n}", re.sub(r"\{ ?", "{\n", re.sub(r"; ", ";\n", code)))
    lines, depth = [], 0
    for line in code.splitlines():
        depth -= line.startswith("}")
        if line.strip():
            lines.append("    " * depth + line.strip())
        depth += line.endswith("{")
    return "\n".join(lines) + ";"


def cdef(tree: Path) -> str:
    """The whole file."""
    header = (tree / "include" / "llama.h").read_text()
    macros = re.findall(r"^#define (LLAMA_(?!API)\w+)[ \t]+\S", header, re.MULTILINE)
    lines = ["// Made by tools/gen_cdef.py from the headers of the patched llama.cpp; do not edit.", ""]
    lines += [f"#define {name} ..." for name in macros] + [""]
    lines += [readable(code) for code in declarations(preprocessed(tree))]
    return "\n".join(lines) + "\n" + CALLBACKS + HELPERS


def main() -> int:
    """The command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    parser.add_argument("--tree", type=Path, default=ROOT / "build" / "llama.cpp", help="the patched llama.cpp")
    args = parser.parse_args()
    text = cdef(args.tree.resolve())
    if not args.check:
        OUT.write_text(text)
    elif not OUT.exists() or OUT.read_text() != text:
        print(f"{OUT.relative_to(ROOT)} is not what the headers say; run python tools/gen_cdef.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
