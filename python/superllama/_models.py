"""Models that other programs keep on this machine: found, and named.

    ollama:llama3.2:3b                     what ollama has pulled
    lmstudio:org/repo/file.gguf            what LM Studio has downloaded
    huggingface:org/repo/file.gguf         what is in the cache of Hugging Face, where -hf and "hf:" download to
    hf:org/repo:Q4_K_M                     the same by its repository, as it is fetched

Nothing is copied, fetched or changed here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ._errors import ModelError
from ._files import model_bytes

SOURCES = ("ollama", "lmstudio", "huggingface")
HF_NAME = re.compile(r"(?:hf:)?(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<quant>[\w.-]+))?")
QUANTS = ("Q4_K_M", "Q8_0")  # which one upstream takes where none is named; else the first that there is
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")


@dataclasses.dataclass(frozen=True)
class Found:
    """A model on this machine. `bytes` are those of all parts of a split one."""

    name: str  # with its source, for Model(), LLM() and -m
    path: Path
    bytes: int


def found_models(*sources: str) -> list[Found]:
    """All that is there, or what these sources have, by name."""
    finders = {"ollama": _ollama, "lmstudio": _lmstudio, "huggingface": _huggingface}
    found = [model for source in sources or SOURCES for model in finders[source]()]
    return sorted(found, key=lambda model: model.name)


def first_names(models: Sequence[Found]) -> str:
    """Some of them, for a message; empty where there are none."""
    return ", ".join(found.name for found in models[:8]) + ", ..." * (len(models) > 8)


def by_name(path: str | os.PathLike[str]) -> str | os.PathLike[str]:
    """The path of a model that has the name of a source before it; anything else as it is.

    Raises: ModelError that says what is there, if that one is not.
    """
    name = str(path) if isinstance(path, str | Path) else ""
    source = name.partition(":")[0]
    if source not in (*SOURCES, "hf") or Path(name).exists():
        return path
    if source == "hf":
        if (here := fetched(name)) is None:
            raise ModelError(f"{name} is not on this machine; `superllama pull {name}` fetches it")
        return str(here.path)
    models = found_models(source)
    for found in models:
        if found.name == name or (found.name == f"{name}:latest" and source == "ollama"):
            return str(found.path)
    names = first_names(models) or "none of that kind"
    raise ModelError(f"there is no model {name} on this machine; there are {names}")


def fetched(name: str) -> Found | None:
    """What -hf takes for hf:org/repo[:quant], if it is here. The rule is upstream's: the quant stands in its path."""
    match = HF_NAME.fullmatch(name)
    prefix = f"huggingface:{match['repo'] if match else ''}/"
    models = [found for found in found_models("huggingface") if found.name.startswith(prefix)]
    quant = match and match["quant"]
    for wanted in [quant] if quant else QUANTS:
        for model in models:
            if re.search(rf"{re.escape(wanted)}[.-]", model.name.removeprefix(prefix), re.IGNORECASE):
                return model
    return None if quant or not models else models[0]


# ---------------------------------------------------------------- where they are


def _ollama() -> Iterator[Found]:
    """A manifest for each tag, in folders by registry, namespace and name; weights by their hash."""
    default = [Path.home() / ".ollama/models", Path("/usr/share/ollama/.ollama/models"), Path("/var/lib/ollama/models")]
    for folder in _folders("OLLAMA_MODELS", default):
        for manifest in _files(folder / "manifests", "*/*/*/*"):
            try:
                layers = json.loads(manifest.read_text())["layers"]
                digest = next(x["digest"] for x in layers if x["mediaType"] == "application/vnd.ollama.image.model")
                blob = folder / "blobs" / str(digest).replace(":", "-")
                size = blob.stat().st_size
            except (OSError, ValueError, KeyError, TypeError, StopIteration):
                continue  # half pulled, or of a kind that is not for us
            registry, namespace, name, tag = manifest.relative_to(folder / "manifests").parts
            prefix = "" if (registry, namespace) == ("registry.ollama.ai", "library") else f"{namespace}/"
            yield Found(f"ollama:{prefix}{name}:{tag}", blob, size)


def _lmstudio() -> Iterator[Found]:
    default = [Path.home() / ".lmstudio/models", Path.home() / ".cache/lm-studio/models"]
    for folder in _folders("LMSTUDIO_MODELS", default):
        yield from _gguf_files("lmstudio", folder, _files(folder, "*/*/*.gguf"))


def _huggingface() -> Iterator[Found]:
    for repo in _files(huggingface_folder(), "models--*--*"):
        name = repo.name.removeprefix("models--").replace("--", "/", 1)
        for found in _gguf_files("huggingface", repo / "snapshots", _files(repo / "snapshots", "*/**/*.gguf")):
            inside = found.name.partition(":")[2].partition("/")[2]  # behind the commit
            yield dataclasses.replace(found, name=f"huggingface:{name}/{inside}")


def huggingface_folder() -> Path:
    """Where llama.cpp downloads to: the first variable that is set says it."""
    for variable, below in (
        ("LLAMA_CACHE", ""),
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ):
        if named := os.environ.get(variable):
            return Path(named) / below
    return Path.home() / ".cache/huggingface/hub"


def _folders(variable: str, default: list[Path]) -> list[Path]:
    named = os.environ.get(variable)
    return [Path(named)] if named else default


def _files(folder: Path, pattern: str) -> list[Path]:
    try:
        return sorted(folder.glob(pattern))
    except OSError:  # of another user
        return []


def _gguf_files(source: str, folder: Path, files: list[Path]) -> Iterator[Found]:
    """Projectors of images are no models, and the later parts of a split one are not named."""
    for file in files:
        if "mmproj" in file.name.lower() or _LATER_PART.search(file.name):
            continue
        try:
            size = model_bytes(file)
        except OSError:  # a link into nowhere
            continue
        yield Found(f"{source}:{file.relative_to(folder).as_posix()}", file, size)
