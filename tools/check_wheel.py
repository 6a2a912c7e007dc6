"""What has to be true of a wheel before anyone installs it: check_wheel.py WHEEL.

Its size and tag, every variant of the CPU's code, no file twice, libraries that show our names only, and no path of the
machine that built it.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MAX_BYTES = 40_000_000
VARIANTS_X86 = {
    *("x64", "sse42", "sandybridge", "ivybridge", "piledriver", "haswell", "alderlake", "skylakex", "cannonlake"),
    *("cascadelake", "icelake", "cooperlake", "zen4", "sapphirerapids"),
}
PROGRAMS = {"cli", "completion", "server", "bench", "perplexity", "quantize"}
STD = re.compile(r"_Z(T[VISCT]|GV|GR|Z)?N?[KVRO]*S[a-z]|_ZN?K?\d+(__gnu_cxx|__cxxabiv1|httplib|nlohmann)|__cxa|_Unwind")


def is_elf(path: Path) -> bool:
    """Whether it is a program or a library."""
    with path.open("rb") as f:
        return f.read(4) == b"\x7fELF"


def problems(wheel: Path) -> list[str]:
    """Every reason not to publish it."""
    found = []
    if wheel.stat().st_size > MAX_BYTES:
        found.append(f"it has {wheel.stat().st_size / 1e6:.1f} MB, the limit is {MAX_BYTES / 1e6:.0f}")
    if not re.search(r"-cp310-abi3-manylinux_[\w.]+\.whl$", wheel.name):
        found.append(f"the tag of {wheel.name} is not cp310-abi3-manylinux")
    with tempfile.TemporaryDirectory() as tmp:
        with zipfile.ZipFile(wheel) as z:
            z.extractall(tmp)
        found += problems_of_files(Path(tmp), x86="x86_64" in wheel.name)
    return found


def problems_of_files(root: Path, *, x86: bool) -> list[str]:
    """The same, of what is in it."""
    found = []
    files = sorted(path for path in root.rglob("*") if path.is_file())
    binaries = [path for path in files if is_elf(path)]
    names = {path.name for path in binaries}
    if missing := {f"llama-{name}" for name in PROGRAMS} - names:
        found.append(f"programs are missing: {sorted(missing)}")
    if x86 and (missing := {f"libggml-cpu-{name}.so" for name in VARIANTS_X86} - names):
        found.append(f"variants are missing: {sorted(missing)}")

    seen: dict[str, Path] = {}
    for path in files:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if path.stat().st_size and digest in seen:
            found.append(f"{path.relative_to(root)} is the same as {seen[digest].relative_to(root)}")
        seen[digest] = path

    here = {str(Path.cwd()), str(Path.home()), tempfile.gettempdir() + "/"} - {"/"}
    for path in binaries:
        content = path.read_bytes()
        for text in here:
            if text.encode() in content:
                found.append(f"{path.relative_to(root)} contains {text}")
        if ".libs" in path.parent.name:
            continue  # libraries of the system, copied in by auditwheel
        out = subprocess.run(
            ["nm", "-D", "--defined-only", "-fposix", str(path)], capture_output=True, text=True
        ).stdout
        shown = [line.split()[0] for line in out.splitlines() if STD.match(line)]
        if ".so" in path.name and shown:
            found.append(f"{path.relative_to(root)} shows {len(shown)} foreign names, such as {shown[0]}")
    return found


def main() -> int:
    """Print what is wrong; 1 if anything is."""
    wheel = Path(sys.argv[1])
    found = problems(wheel)
    for problem in found:
        print(f"check_wheel: {problem}", file=sys.stderr)
    if not found:
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB, nothing to object")
    return 1 if found else 0


if __name__ == "__main__":
    os.environ["LC_ALL"] = "C"
    sys.exit(main())
