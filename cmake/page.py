"""The server's page: built from the pinned tree with npm, once, and kept in the cache folder.

    page.py put TREE MODE     put the page into TREE/tools/ui/dist, where upstream's build embeds it from

MODE is ON (there must be a page), AUTO (where Node.js is at hand), or OFF. Prints "page", or why there is none; then
a stand-in goes there, whose / answers with one line on how to get it. Nothing that is built already is downloaded.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from upstream import STAMP, UpstreamError, cache_dir, pin, pristine

NODE = (20, 19)  # what the page's own build asks for

HOW = (
    "superllama: this server was built without its page; the API is complete. The wheels have it; from source, install "
    "Node.js {}.{} or newer with npm and build again.".format(*NODE)
)
# upstream embeds a page only where all of its files are there; the worker takes itself out of browsers that had a page
STAND_IN = {
    "index.html": HOW + "\n",
    "sw.js": "self.addEventListener('activate', () => self.registration.unregister());\n",
    "manifest.webmanifest": "{}\n",
    "build.json": "{}\n",
    "_app/version.json": "{}\n",
    "_app/bundle.none.js": "//\n",
    "_app/bundle.none.css": "/**/\n",
    "workbox-none.js": "//\n",
}


def stamp_file(dist: Path) -> Path:
    """Says what `dist` was made from; beside it, because upstream embeds every file of the folder."""
    return dist.with_name(dist.name + STAMP)


def ready(dist: Path, stamp: str) -> bool:
    file = stamp_file(dist)
    return file.is_file() and file.read_text().strip() == stamp


def npm_problem() -> str | None:
    """Why npm cannot build the page here, None if it can."""
    node = shutil.which("node")
    if node is None or shutil.which("npm") is None:
        return "Node.js and npm are not installed"
    found = subprocess.run([node, "--version"], capture_output=True, text=True).stdout.strip()
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:2])
    if numbers < NODE:
        return f"Node.js {found} is older than {NODE[0]}.{NODE[1]}"
    return None


def npm(folder: Path, *arguments: str, **environment: str) -> None:
    command = [shutil.which("npm") or "npm", *arguments]
    try:
        done = subprocess.run(
            command, cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=1800
        )
    except subprocess.TimeoutExpired as e:
        raise UpstreamError(f"npm {arguments[0]} took more than half an hour") from e
    if done.returncode:
        last = "\n".join((done.stderr or done.stdout).strip().splitlines()[-8:])
        raise UpstreamError(f"npm {' '.join(arguments)} failed:\n{last}")


def build(source: Path, dist: Path, stamp: str) -> None:
    """npm ci, which takes what package-lock.json names by hash, and the page's own build; `dist` is whole or absent."""
    dist.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".superllama-page-", dir=dist.parent) as tmp:
        work, new = Path(tmp) / "ui", Path(tmp) / "dist"
        shutil.copytree(source, work)
        npm(work, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=1")
        number = pin()["build"].lstrip("b")
        npm(work, "run", "build", LLAMA_UI_OUT_DIR=str(new), LLAMA_UI_VERSION="b" + number, LLAMA_BUILD_NUMBER=number)
        if not (new / "index.html").is_file():
            raise UpstreamError("npm run build ended well and made no index.html")
        shutil.rmtree(dist, ignore_errors=True)
        new.rename(dist)
    stamp_file(dist).write_text(stamp + "\n")


def built(stamp: str) -> Path:
    """The folder of the built page; of a source distribution, or of the cache. Raises UpstreamError if it cannot be."""
    carried, cached = pristine() / "tools/ui/dist", cache_dir() / "page" / pin()["build"] / "dist"
    for dist in (carried, cached):
        if ready(dist, stamp):
            return dist
    if problem := npm_problem():
        raise UpstreamError(problem)
    print("superllama: building the server's page with npm; two minutes, once", file=sys.stderr)
    build(pristine() / "tools/ui", cached, stamp)
    return cached


def put(tree: Path, mode: str) -> str:
    """What is in `tree` now: "page", or the reason why there is none."""
    dist, stamp = tree / "tools/ui/dist", pin()["sha256"]
    reason = "SUPERLLAMA_PAGE is OFF"
    if mode != "OFF":
        try:
            source = built(stamp)
        except (UpstreamError, OSError) as e:
            if mode == "ON":
                raise
            reason = str(e)
        else:
            if not ready(dist, stamp):
                shutil.rmtree(dist, ignore_errors=True)
                shutil.copytree(source, dist)
                stamp_file(dist).write_text(stamp + "\n")
            return "page"
    stamp = "none " + hashlib.sha256(repr(STAND_IN).encode()).hexdigest()
    if not ready(dist, stamp):
        shutil.rmtree(dist, ignore_errors=True)
        for name, text in STAND_IN.items():
            (dist / name).parent.mkdir(parents=True, exist_ok=True)
            (dist / name).write_text(text)
        stamp_file(dist).write_text(stamp + "\n")
    return reason


def main() -> int:
    match sys.argv[1:]:
        case ["put", tree, ("ON" | "AUTO" | "OFF") as mode]:
            try:
                print(put(Path(tree), mode))
            except (UpstreamError, OSError) as e:
                print(f"superllama: no page for the server, and SUPERLLAMA_PAGE=ON asks for it: {e}", file=sys.stderr)
                return 1
            return 0
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
