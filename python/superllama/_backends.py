"""Backends in packages of their own: superllama-cuda and its like hold one library, loaded from where it is installed.

Such a package is a folder `superllama_<backend>` with `libggml-<backend>.so` in it; tools/wheel.sh makes them.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path

NAMES = ("cuda", "hip", "vulkan", "sycl", "blas")  # the first that is installed is the one that programs load

# where systems keep the certificates that HTTPS is checked against
CERTIFICATES = (
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/ca-bundle.pem",
    "/etc/ssl/cert.pem",
)


def backend_files() -> list[Path]:
    """The libraries of the backend packages that are installed."""
    found = []
    for name in NAMES:
        spec = importlib.util.find_spec(f"superllama_{name}")
        for folder in (spec.submodule_search_locations if spec else None) or ():
            found += [file for file in [Path(folder) / f"libggml-{name}.so"] if file.is_file()]
    return found


def for_programs(environment: Mapping[str, str], package: Path) -> dict[str, str]:
    """What a program of `package`, the folder superllama, needs beside `environment`: the user's own values stay.

    A wheel carries an OpenSSL, which looks for certificates where the system that compiled it has them.
    """
    extra = {}
    if files := backend_files():
        extra["GGML_BACKEND_PATH"] = str(files[0])
    if package.with_name("superllama.libs").is_dir() and "SSL_CERT_DIR" not in environment:
        for path in filter(os.path.isfile, CERTIFICATES):
            extra.setdefault("SSL_CERT_FILE", path)
    return {name: value for name, value in extra.items() if name not in environment}
