"""Pack the library of one backend as a wheel of its own: backend_wheel.py BACKEND LIBRARY FOLDER.

The package superllama finds it when it is installed (python/superllama/_backends.py). It fits one version of
superllama: the library takes functions of that one's ggml. The backend's own libraries (CUDA's, say) are the system's,
or other packages'.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import sys
import sysconfig
import zipfile
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def make(backend: str, library: Path, folder: Path) -> Path:
    """Write the wheel into `folder`, return its path."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    package, info = f"superllama_{backend}", f"superllama_{backend}-{version}.dist-info"
    tag = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
    metadata = (
        f"Metadata-Version: 2.4\nName: superllama-{backend}\nVersion: {version}\n"
        f"Summary: The {backend} backend of superllama\nLicense-Expression: MIT\nLicense-File: LICENSE\n"
        f"Requires-Python: >=3.10\nRequires-Dist: superllama=={version}\n"
    )
    files = {
        f"{package}/__init__.py": f'"""The {backend} backend of superllama: one library, loaded by it."""\n'.encode(),
        f"{package}/libggml-{backend}.so": library.read_bytes(),
        f"{info}/METADATA": metadata.encode(),
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: superllama\nRoot-Is-Purelib: false\nTag: {tag}\n".encode(),
        f"{info}/licenses/LICENSE": (ROOT / "LICENSE").read_bytes(),
        f"{info}/licenses/LICENSE.llama.cpp": (ROOT / "vendor" / "llama.cpp" / "LICENSE").read_bytes(),
    }
    record = io.StringIO()
    rows = csv.writer(record, lineterminator="\n")
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.writerow([name, f"sha256={digest}", len(content)])
    rows.writerow([f"{info}/RECORD", "", ""])
    files[f"{info}/RECORD"] = record.getvalue().encode()

    wheel = folder / f"{package}-{version}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in files.items():
            z.writestr(name, content)
    return wheel


if __name__ == "__main__":
    print(make(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
