"""Files of repositories of Hugging Face, as llama-cpp-python's from_pretrained() names them."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence


def hub_file(
    repo_id: str,
    filename: str | None,
    additional_files: Sequence[str] | None = None,
    local_dir: str | None = None,
    cache_dir: str | None = None,
) -> str:
    """The path of a file whose name may have * and ?, fetched once.

    Raises: ImportError without the package huggingface_hub, ValueError where not one file has that name.
    """
    try:
        from huggingface_hub import hf_hub_download, list_repo_files  # type: ignore[import-not-found,unused-ignore]
    except ImportError as e:
        raise ImportError(
            "from_pretrained() needs huggingface_hub: pip install huggingface-hub; or Llama('hf:org/repo:Q4_K_M')"
        ) from e
    names = [name for name in list_repo_files(repo_id) if name.endswith(".gguf")]
    found = [name for name in names if filename is None or fnmatch.fnmatch(name, filename)]
    if not found:
        raise ValueError(f"no file of {repo_id} matches {filename!r}; there are {', '.join(names) or 'no GGUF files'}")
    if len(found) > 1:
        raise ValueError(f"{len(found)} files of {repo_id} match {filename!r}: {', '.join(found)}")
    where = {"local_dir": local_dir, "cache_dir": cache_dir}
    for name in additional_files or ():
        for other in fnmatch.filter(names, name):
            hf_hub_download(repo_id, other, **where)
    return str(hf_hub_download(repo_id, found[0], **where))
