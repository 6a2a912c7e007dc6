"""Images and sounds in requests: a path, bytes, a PIL.Image or a URL becomes what the API takes.

Files are read here, for the server refuses to: over HTTP whoever asks would read its disk. What cannot work is an error
before there is a request.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import os
import shutil
import urllib.parse
import urllib.request
import wave
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from .._errors import ModelError, PromptError
from .._files import open_regular
from .media_kinds import Kind, kind_of, size_of

MARK = "<__media__>"  # stands for an image or a sound in a prompt
MOST_BYTES = 256 << 20  # of a file: a request holds it several times
MOST_PIXELS = 100_000_000  # three bytes for each, before it is scaled for the model

_NAMES: dict[Kind, str] = {"image": "image", "audio": "sound"}
# the type of a part of a message -> what it is
_PARTS: dict[str, Kind] = {
    **{"image_url": "image", "image": "image", "input_image": "image"},
    **{"input_audio": "audio", "audio_url": "audio", "audio": "audio"},
}


@dataclasses.dataclass(frozen=True)
class Senses:
    """What an engine takes beside texts, and the mark that its prompts have where that stands."""

    image: bool
    audio: bool
    mark: str

    def check(self, kind: Kind) -> None:
        """Raises: ModelError where the model has no projector for it."""
        if kind == "image" and not self.image or kind == "audio" and not self.audio:
            name, other = _NAMES[kind], next((_NAMES[k] for k in _NAMES if getattr(self, k)), None)
            if other:
                raise ModelError(f"this model takes {other}s, and no {name}s: its projector has no part for them")
            raise ModelError(
                f"this model was loaded without a projector, so it takes no {name}s; mmproj= names the file that comes "
                "with the model for that (mmproj-*.gguf)"
            )


AskSenses = Callable[[], Senses]


def senses_of(props: Mapping[str, Any]) -> Senses:
    """What the server says of itself."""
    found = props["modalities"]
    return Senses(bool(found["vision"]), bool(found["audio"]), str(props["media_marker"]))


# ---------------------------------------------------------------- conversations


def with_media(messages: Sequence[Mapping[str, Any]], senses: AskSenses) -> list[dict[str, Any]]:
    """The messages as the API has them."""
    return [_message(dict(message), f"message {i}", senses) for i, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str, senses: AskSenses) -> dict[str, Any]:
    images = _several(message.pop("images", None))
    content = message.get("content")
    if images:  # as ollama has it: before the text
        text = [{"type": "text", "text": content}] if isinstance(content, str) and content else content or []
        content = [*({"type": "image", "image": image} for image in images), *text]
    if isinstance(content, Sequence) and not isinstance(content, str):
        message["content"] = [_part(part, f"{where}, part {i}", senses) for i, part in enumerate(content)]
    return message


def _part(part: Any, where: str, senses: AskSenses) -> Any:
    kind = _PARTS.get(part.get("type", "")) if isinstance(part, Mapping) else None
    if kind is None:
        return part
    value = part.get(part["type"], part)
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("url", "data", "path") if key in value), None)
    senses().check(kind)
    url = value if _is_remote(value) else _data_url(bytes_of(value, kind, where))
    return {"type": "image_url" if kind == "image" else "input_audio", _API_KEYS[kind]: {"url": url}}


_API_KEYS: dict[Kind, str] = {"image": "image_url", "audio": "input_audio"}


def _is_remote(value: Any) -> bool:
    return isinstance(value, str) and value.lower().startswith(("http://", "https://"))


def _data_url(data: bytes) -> str:
    kind, subtype = kind_of(data) or ("image", "x")
    return f"data:{kind}/{subtype};base64,{base64.b64encode(data).decode()}"


# ---------------------------------------------------------------- prompts without a template
