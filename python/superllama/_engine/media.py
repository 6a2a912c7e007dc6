"""Images and sounds in requests, as the API takes them.

Files are read here, for the server refuses to: whoever asks it would read its disk. What cannot work is an error before
there is a request.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .._errors import ModelError, PromptError
from .media_files import NAMES, Kind, MediaFile, media_file

MARK = "<__media__>"  # where an image or a sound belongs in a prompt

# the type of a part of a message -> what it is
_PARTS: dict[Any, Kind] = {
    **{"image_url": "image", "image": "image"},
    **{"input_audio": "audio", "audio_url": "audio", "audio": "audio"},
}


@dataclasses.dataclass(frozen=True)
class Senses:
    """What a model takes beside texts, and the mark that its engine wants instead of MARK: one that nobody guesses."""

    image: bool
    audio: bool
    mark: str

    def check(self, kind: Kind) -> None:
        """Raises: ModelError where it takes no such thing."""
        takes = {"image": self.image, "audio": self.audio}
        if takes[kind]:
            return
        if not any(takes.values()):
            raise ModelError(
                f"this model was loaded without a projector, so it takes no {NAMES[kind]}s; mmproj= names the file for "
                "that, which comes beside the model (mmproj-*.gguf)"
            )
        other = NAMES["audio" if kind == "image" else "image"]
        raise ModelError(f"this model takes {other}s, and no {NAMES[kind]}s: its projector has no part for them")


AskSenses = Callable[[], Senses]  # asked only where there is something to see or to hear


def senses_of(props: Mapping[str, Any]) -> Senses:
    """What the engine says of itself."""
    found = props["modalities"]
    return Senses(bool(found["vision"]), bool(found["audio"]), str(props["media_marker"]))


# ---------------------------------------------------------------- conversations


def with_media(messages: Sequence[Mapping[str, Any]], senses: AskSenses) -> list[dict[str, Any]]:
    """The messages with data where there were paths, images and other values."""
    return [_message(dict(message), f"message {i}", senses) for i, message in enumerate(messages)]


def _message(message: dict[str, Any], where: str, senses: AskSenses) -> dict[str, Any]:
    images = _several(message.pop("images", None))
    content = message.get("content")
    if images:  # ollama's way, which puts them before the text
        text = [{"type": "text", "text": content}] if isinstance(content, str) else list(content or ())
        content = [*({"type": "image", "image": image} for image in images), *text]
    if isinstance(content, Sequence) and not isinstance(content, str):
        message["content"] = [_part(part, f"{where}, part {i},", senses) for i, part in enumerate(content)]
    return message


def _part(part: Any, where: str, senses: AskSenses) -> Any:
    kind = _PARTS.get(part.get("type")) if isinstance(part, Mapping) else None
    if kind is None:
        return part
    senses().check(kind)
    value = part.get(part["type"], part)
    if isinstance(value, Mapping):
        value = next((value[key] for key in ("url", "data", "path") if key in value), None)
    key = "image_url" if kind == "image" else "input_audio"
    return {"type": key, key: {"url": value if _is_remote(value) else _file(value, where, kind).url}}


def _is_remote(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("http://", "https://"))


def _file(value: Any, where: str, kind: Kind) -> MediaFile:
    file = media_file(value, where)
    if file.kind != kind:
        raise PromptError(f"{where} is of the wrong kind: {NAMES[file.kind]} ({file.format}), not {NAMES[kind]}")
    return file


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


# ---------------------------------------------------------------- prompts without a template


def media_prompt(prompt: Mapping[str, Any], where: str, senses: AskSenses) -> dict[str, Any] | str:
    """A prompt with images or sounds, as the API has it; the text alone where there are none.

    They are in `images`, `audio`, vLLM's `multi_modal_data`, or the API's `multimodal_data` in any order; each belongs
    to a MARK in `prompt`.
    """
    text, given = _media_of(dict(prompt), where)
    if not given:
        return text
    known = senses()
    text = text.replace(known.mark, MARK)
    if text.count(MARK) != len(given):
        raise PromptError(
            f"{where} has {len(given)} images and sounds, and {text.count(MARK)} times {MARK}: write that where each "
            "of them belongs"
        )
    if text.endswith(MARK):
        raise PromptError(f"{where} ends with an image or a sound, and a model goes on from text: write some after it")
    files = []
    for i, (kind, value) in enumerate(given):
        file = _file(value, f"{where}, number {i},", kind) if kind else media_file(value, f"{where}, number {i},")
        known.check(file.kind)
        files.append(file.base64)
    return {"prompt_string": text.replace(MARK, known.mark), "multimodal_data": files}


def _media_of(prompt: dict[str, Any], where: str) -> tuple[str, list[tuple[Kind | None, Any]]]:
    text = prompt.pop("prompt_string", None) or prompt.pop("prompt", None)
    if not isinstance(text, str):
        raise PromptError(f"{where} has no text under 'prompt'")
    both = dict(prompt.pop("multi_modal_data", None) or {})
    kinds: dict[Kind | None, list[Any]] = {
        "image": [*_several(prompt.pop("images", None)), *_several(both.pop("image", None))],
        "audio": [*_several(prompt.pop("audio", None)), *_several(both.pop("audio", None))],
        None: _several(prompt.pop("multimodal_data", None)),
    }
    if unknown := {**prompt, **both}:
        raise PromptError(
            f"{where} has {', '.join(map(repr, unknown))}; there are prompt, images, audio, multimodal_data, and "
            "multi_modal_data with image and audio"
        )
    if sum(map(bool, kinds.values())) > 1:
        raise PromptError(f"{where} has images and sounds apart; give them in their order as multimodal_data=[...]")
    return text, [(kind, value) for kind, values in kinds.items() for value in values]
