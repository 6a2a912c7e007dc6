"""`superllama pull`: fetch a model of Hugging Face to where -hf and "hf:" look for it, and end.

llama.cpp's programs fetch what -hf names before they print the completion of a shell, and load nothing for that.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
from collections.abc import Sequence

from .._errors import DownloadError, RequestError
from .._models import HF_NAME, SOURCES, Found, fetched, first_names, found_models, huggingface_folder
from .._programs import find_program, program_environment
from .download_bar import download_bar

PARTLY = "*.downloadInProgress"
INFO = "3"  # a verbosity at which upstream says which files a repository has


@dataclasses.dataclass(frozen=True)
class Pulled:
    """A model that is here now. `warning` says why the repository could not be asked, "" if it could."""

    model: Found
    warning: str


def pull(name: str) -> Pulled:
    """Fetch `hf:org/repo[:quant]`, or see that it is here. What was fetched in part goes on.

    Raises: RequestError for another name, DownloadError that says why it cannot be fetched, and what is here.
    """
    match = HF_NAME.fullmatch(name)
    if match is None:
        others = name.partition(":")[0] in SOURCES
        why = "only what Hugging Face has can be fetched; " if others else ""
        raise RequestError(f"{name}: {why}a name is hf:ORG/REPO, or hf:ORG/REPO:QUANT, such as Q4_K_M")
    program = find_program("llama-cli")
    words = ["--log-verbosity", INFO, "-hf", name.removeprefix("hf:"), "--completion-bash"]
    folder = huggingface_folder() / f"models--{match['repo'].replace('/', '--')}"
    with download_bar(folder, name.removeprefix("hf:"), PARTLY):
        done = subprocess.run(
            [str(program), *words],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=program_environment(program, os.environ),
        )
    errors = _errors(done.stderr)
    found = fetched(name)
    if done.returncode or found is None:
        raise DownloadError(_failure(name, errors, _files(done.stderr)))
    return Pulled(found, errors)


def _errors(log: str) -> str:
    """What upstream says went wrong, without the pages that servers send along."""
    lines = [
        re.sub(r"^[\d.]+ E \S+?:? (error: )?", "", line) for line in log.splitlines() if re.match(r"[\d.]+ E ", line)
    ]
    lines = lines or [line for line in log.splitlines() if line.startswith(("error: ", "Download "))]
    return "; ".join(re.sub(r": *<.*", "", line).strip() for line in lines)


def _files(log: str) -> list[str]:
    return re.findall(r" - (\S+\.gguf)", log)


def _failure(name: str, errors: str, files: Sequence[str]) -> str:
    """Why it is not here, and what to try, or what to use instead."""
    hint = ""
    if files:
        hint = f"; the repository has {', '.join(files)}"
    elif "(401)" in errors or "(403)" in errors:
        hint = "; there may be no such repository, or HF_TOKEN has to hold a token that may read it"
    elif "(404)" in errors:
        hint = "; there is no such repository"
    else:
        hint = "; check the network, HF_ENDPOINT, and whether this build has HTTPS (superllama doctor)"
    here = first_names(found_models())
    instead = f"; on this machine there are {here}" if here else ""
    return f"{name} cannot be fetched: {errors or 'nothing came'}{hint}{instead}"
