"""llama-cpp-python's chat handlers for images: of them the projector counts here, and the template is the model's."""

from __future__ import annotations

import os
import types
from typing import Any

from .compat_hub import hub_file

HANDLERS = (
    *("Llava15ChatHandler", "Llava16ChatHandler", "MoondreamChatHandler", "NanoLlavaChatHandler"),
    *("ObsidianChatHandler", "Llama3VisionAlphaChatHandler", "MiniCPMv26ChatHandler", "Qwen25VLChatHandler"),
)


class ImageHandler:
    """A projector, under all the names that handlers have there."""

    def __init__(self, clip_model_path: str | os.PathLike[str], verbose: bool = True) -> None:
        self.clip_model_path = os.fspath(clip_model_path)
        self.verbose = verbose

    @classmethod
    def from_pretrained(
        cls,
        repo_id: str,
        filename: str | None,
        local_dir: str | None = None,
        cache_dir: str | None = None,
        **kwargs: Any,
    ) -> ImageHandler:
        """The projector that is a file of a repository of Hugging Face."""
        return cls(hub_file(repo_id, filename, None, local_dir, cache_dir), **kwargs)


def projector_of(chat_handler: Any) -> str | None:
    """The file of a handler's projector, ours or one of that package; None if it has none."""
    return getattr(chat_handler, "clip_model_path", None)


def chat_format_module() -> types.ModuleType:
    """What stands for llama_cpp.llama_chat_format."""
    module = types.ModuleType("llama_cpp.llama_chat_format", __doc__)
    for name in HANDLERS:
        setattr(module, name, ImageHandler)
    return module
