"""Obtain the pinned llama.cpp, and keep a patched copy of it in the build tree.

    upstream.py fetch           print the folder of the pristine tree; download it if it is not there
    upstream.py patch DEST      make DEST the pristine tree with patches/series applied
    upstream.py check           apply and reverse the series on a copy of the pristine tree
    upstream.py unpack DEST     put the pristine tree into DEST (for our source distribution)
    upstream.py edit DEST       make DEST a git repository: the pristine tree, then one commit a patch
    upstream.py export DEST     write patches/ anew from those commits

The pristine tree is looked for in vendor/llama.cpp/tree (a source distribution carries it), then in
the user's cache folder, and otherwise comes from the package that vendor/llama.cpp/UPSTREAM.toml names,
by the pip and the index that the user has configured.
"""

from __future__ import annotations

import contextlib
import filecmp
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent

sys.path.append(str(ROOT / "python" / "superllama"))
from _cache import cache_dir  # noqa: E402 - the installed package's rules

VENDOR = ROOT / "vendor" / "llama.cpp"
PATCHES = ROOT / "patches"
STAMP = ".superllama"  # in a tree: what it was made from


class UpstreamError(Exception):
    """Something that the user has to know and can mend: what, why, what to try."""


def pin() -> dict[str, str]:
    return tomllib.loads((VENDOR / "UPSTREAM.toml").read_text())["upstream"]


# ---------------------------------------------------------------- fetch


def pristine() -> Path:
    """The folder of the verified, unpatched tree."""
    p = pin()
    for tree in (VENDOR / "tree", cache_dir() / "upstream" / p["build"]):
        if stamp_of(tree) == p["sha256"]:
            return tree
    try:
        unpack(tree, p)
    except OSError as e:
        raise UpstreamError(
            f"cannot unpack llama.cpp into {tree}: {e.strerror or e}. It needs 80 MB there and 40 MB in "
            f"{tempfile.gettempdir()}; free some space, or name another folder in SUPERLLAMA_CACHE."
        ) from e
    return tree


def stamp_of(tree: Path) -> str | None:
    with contextlib.suppress(OSError):
        return (tree / STAMP).read_text().strip()
    return None


def unpack(tree: Path, p: dict[str, str]) -> None:
    """Put the pinned tree into `tree`; the stamp comes last, so an interrupted call starts over."""
    with tempfile.TemporaryDirectory(prefix="superllama-") as tmp:
        sdist = download(p, Path(tmp))
        digest = hashlib.sha256(sdist.read_bytes()).hexdigest()
        if digest != p["sha256"]:
            raise UpstreamError(
                f"{sdist.name} has sha256 {digest}, expected {p['sha256']}. "
                "The index served another file; check its address (pip config list) and try again."
            )
        tree.parent.mkdir(parents=True, exist_ok=True)
        new = Path(tempfile.mkdtemp(prefix=tree.name + ".", dir=tree.parent))
        try:
            with tarfile.open(sdist) as tar:
                for member, name in wanted(tar, p):
                    target = new / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    source = tar.extractfile(member)
                    assert source is not None  # wanted() yields files only
                    with source, target.open("wb") as out:
                        shutil.copyfileobj(source, out)
                    os.utime(target, (member.mtime, member.mtime))
            (new / STAMP).write_text(p["sha256"] + "\n")
            shutil.rmtree(tree, ignore_errors=True)
            new.chmod(0o755)
            new.rename(tree)
        finally:
            shutil.rmtree(new, ignore_errors=True)


def download(p: dict[str, str], folder: Path) -> Path:
    requirement = f"{p['package']}=={p['version']}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--no-binary", p["package"], "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    files = list(folder.glob("*.tar.gz"))
    if done.returncode or len(files) != 1:
        reason = "\n".join((done.stderr or done.stdout).strip().splitlines()[-4:])
        raise UpstreamError(
            f"cannot download {requirement} (it carries llama.cpp {p['build']}) with pip:\n{reason}\n"
            "Check the network and pip's index settings (pip config list), or install from our source "
            "distribution, which carries the tree."
        )
    return files[0]


def wanted(tar: tarfile.TarFile, p: dict[str, str]) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """The files below the pin's path, less the folders that the build does not use."""
    omit = tuple(folder + "/" for folder in p["omit"])
    for member in tar:
        top_and_path, _, name = member.name.partition("/" + p["path"] + "/")
        if not member.isfile() or not name or "/" in top_and_path or ".." in name.split("/"):
            continue
        if not name.startswith((".", *omit)):
            yield member, name


# ---------------------------------------------------------------- patch


def series() -> list[Path]:
    lines = (PATCHES / "series").read_text().splitlines()
    return [PATCHES / line.strip() for line in lines if line.strip() and not line.startswith("#")]


def touched(patches: list[Path]) -> set[str]:
    text = "".join(p.read_text() for p in patches)
    return set(re.findall(r"^\+\+\+ b/(\S+)", text, re.MULTILINE))


def apply_series(tree: Path, *, reverse: bool = False) -> None:
    """Apply with git where there is one, else with patch; the tree is in no repository's eyes."""
    env = dict(os.environ, GIT_CEILING_DIRECTORIES=str(tree.resolve().parent), LC_ALL="C")
    git = shutil.which("git")
    for patch in reversed(series()) if reverse else series():
        if git:
            command = [git, "apply", "--whitespace=nowarn", *(["-R"] if reverse else []), str(patch)]
        else:
            command = ["patch", "-p1", "--fuzz=0", "--silent", *(["-R"] if reverse else []), "-i", str(patch)]
        try:
            done = subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True)
        except FileNotFoundError as e:
            raise UpstreamError("neither git nor patch is installed; install one of them") from e
        if done.returncode:
            raise UpstreamError(
                f"{patch.name} does not {'reverse' if reverse else 'apply'}:\n{done.stderr or done.stdout}"
            )


def patch_tree(dest: Path) -> None:
    """Make `dest` the patched tree. Only files that change are written, so that a build stays small."""
    source, patches = pristine(), series()
    content = hashlib.sha256(b"".join(p.read_bytes() for p in patches)).hexdigest()
    stamp = f"{pin()['sha256']} {content}"
    if stamp_of(dest) == stamp:
        return
    dest.mkdir(parents=True, exist_ok=True)
    (dest / STAMP).unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="superllama-") as tmp:
        files = touched(patches)
        for name in files:
            (Path(tmp) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, Path(tmp) / name)
        apply_series(Path(tmp))
        for name in files:
            if filecmp.cmp(source / name, Path(tmp) / name, shallow=False):
                raise UpstreamError(f"{name} is unchanged after the patches: they did not take")
        for path in source.rglob("*"):
            name = path.relative_to(source).as_posix()
            if path.is_file() and name != STAMP:
                new = Path(tmp) / name if name in files else path
                old = dest / name
                if not (old.is_file() and filecmp.cmp(new, old, shallow=False)):
                    old.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(new, old)
                    if name in files:
                        old.touch()
    (dest / STAMP).write_text(stamp + "\n")


def check() -> str:
    """Apply the series to the pristine tree, reverse it, and compare."""
    source, files = pristine(), touched(series())
    with tempfile.TemporaryDirectory(prefix="superllama-") as tmp:
        for name in files:
            (Path(tmp) / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source / name, Path(tmp) / name)
        apply_series(Path(tmp))
        for name in files:
            if filecmp.cmp(source / name, Path(tmp) / name, shallow=False):
                raise UpstreamError(f"{name} is unchanged after the patches: they did not take")
        apply_series(Path(tmp), reverse=True)
        for name in files:
            if not filecmp.cmp(source / name, Path(tmp) / name, shallow=False):
                raise UpstreamError(f"{name} differs from upstream after reversing the patches")
    added = sum(len(re.findall(r"^\+(?!\+\+ )", p.read_text(), re.MULTILINE)) for p in series())
    if added > 200:
        raise UpstreamError(f"the patches add {added} lines; the limit is 200: move logic into src/")
    found = f"{len(series())} patches apply and reverse cleanly on {len(files)} files, {added} lines added"
    return f"{found}; {pin()['former']}"


# ---------------------------------------------------------------- edit


def git(tree: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=superllama", "-c", "user.email=superllama@localhost"]
    done = subprocess.run(["git", *identity, *arguments], cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise UpstreamError(f"git {arguments[0]} in {tree}:\n{done.stderr or done.stdout}")
    return done.stdout


def edit(dest: Path) -> None:
    shutil.copytree(pristine(), dest)
    git(dest, "init", "--quiet")
    git(dest, "add", "--all", "--force")
    git(dest, "commit", "--quiet", "--message", "pristine")
    for patch in series():
        header, _, _ = patch.read_text().partition("\ndiff --git")
        git(dest, "apply", "--index", "--whitespace=nowarn", str(patch))
        git(dest, "commit", "--quiet", "--message", f"{header.strip()}\n\nFile: {patch.name}")


def export(dest: Path) -> None:
    names = []
    for commit in git(dest, "rev-list", "--reverse", "HEAD").split()[1:]:
        header, _, name = git(dest, "show", "--no-patch", "--format=%B", commit).strip().rpartition("\n\nFile: ")
        if not name.endswith(".patch"):
            raise UpstreamError(f"commit {commit[:9]} does not end with a line 'File: NNNN-name.patch'")
        diff = git(dest, "show", "--format=", "--no-color", commit)
        diff = "".join(line for line in diff.splitlines(keepends=True) if not line.startswith("index "))
        (PATCHES / name).write_text(f"{header}\n\n{diff}")
        names.append(name)
    (PATCHES / "series").write_text(
        "# applied in this order; one concern a file, call sites only\n" + "".join(f"{name}\n" for name in names)
    )


def main() -> int:
    try:
        match sys.argv[1:]:
            case ["fetch"]:
                print(pristine().as_posix())
            case ["patch", dest]:
                patch_tree(Path(dest))
            case ["unpack", dest]:
                if stamp_of(Path(dest)) != pin()["sha256"]:
                    shutil.copytree(pristine(), dest, dirs_exist_ok=True)
            case ["edit", dest]:
                edit(Path(dest))
            case ["export", dest]:
                export(Path(dest))
            case ["check"]:
                print(check())
            case _:
                print(__doc__, file=sys.stderr)
                return 2
    except UpstreamError as e:
        print(f"superllama: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
