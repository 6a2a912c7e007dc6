"""Sounds in requests: whatever they are given as, the model gets the same."""

from __future__ import annotations

import base64
import io
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_projector
from tiny_projector import SOUND_FRAME, SOUND_RATE

import superllama

FRESH: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "max_tokens": 6, "logprobs": 3, "cache_prompt": False}
# of silence: what a decoder needs of a frame is its first four bytes
MP3 = (b"\xff\xfb\x90\x64" + bytes(413)) * 40


def samples(seed: int, n: int = 4 * SOUND_FRAME) -> Any:
    return (np.random.default_rng(seed).uniform(-0.5, 0.5, n) * 32767).astype(np.int16)


def wav(seed: int, n: int = 4 * SOUND_FRAME) -> bytes:
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, SOUND_RATE, 0, "NONE", ""))
        out.writeframes(samples(seed, n).tobytes())
    return file.getvalue()


def asked(*parts: Any) -> list[dict[str, Any]]:
    """A message with sounds, as OpenAI's API has them."""

    def part(value: Any) -> Any:
        if isinstance(value, str):
            return {"type": "text", "text": value}
        if isinstance(value, bytes):
            return {"type": "input_audio", "input_audio": {"data": base64.b64encode(value).decode(), "format": "wav"}}
        return value

    return [{"role": "user", "content": [part(value) for value in parts]}]


def heard(llm: superllama.LLM, messages: Any) -> tuple[Any, int]:
    answer = llm.chat(messages, **FRESH)
    return answer.logprobs, answer.usage.prompt_tokens


FORMS: dict[str, Callable[[Path], Any]] = {
    "path": lambda file: {"type": "input_audio", "input_audio": file},
    "path of the data": lambda file: {"type": "input_audio", "input_audio": {"data": str(file), "format": "wav"}},
    "bytes": lambda file: {"type": "audio", "audio": file.read_bytes()},
    "URL": lambda file: {
        "type": "audio_url",
        "audio_url": {"url": f"data:audio/wav;base64,{base64.b64encode(file.read_bytes()).decode()}"},
    },
    "samples": lambda file: {"type": "audio", "audio": (samples(1), SOUND_RATE)},
    "samples with fractions": lambda file: {"type": "audio", "audio": (samples(1) / 32767, SOUND_RATE)},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_sound(form: str, seeing: superllama.LLM, tmp_path: Path) -> None:
    file = tmp_path / "a sound.wav"
    file.write_bytes(wav(1))
    (found, n_found), (expected, n_expected) = heard(seeing, asked(FORMS[form](file))), heard(seeing, asked(wav(1)))
    assert n_found == n_expected
    if form == "samples with fractions":  # which are rounded
        assert [entry.token for entry in found] == [entry.token for entry in expected]
    else:
        assert found == expected


def test_mp3(seeing: superllama.LLM, tmp_path: Path) -> None:
    (tmp_path / "a.mp3").write_bytes(MP3)
    found, n_found = heard(seeing, asked({"type": "audio", "audio": tmp_path / "a.mp3"}))
    second = heard(seeing, asked(wav(1, SOUND_RATE)))
    assert found != second[0] and abs(n_found - second[1]) < 4  # it takes a second, or a little more


def test_sounds_are_heard_and_counted(seeing: superllama.LLM) -> None:
    found = [
        heard(seeing, asked("the", *sounds)) for sounds in ([wav(1)], [wav(2)], [wav(1), wav(2)], [wav(2), wav(1)])
    ]
    for i, (logprobs, _) in enumerate(found):
        assert all(logprobs != other for other, _ in found[:i])
    long, short = (heard(seeing, asked(wav(1, n * SOUND_FRAME)))[1] for n in (20, 4))
    assert long - short == 16


def test_the_same_sound_again_is_not_computed(seeing: superllama.LLM) -> None:
    first = seeing.chat(asked("the", wav(11)), **FRESH).usage
    again = seeing.chat(asked("the", wav(11)), **(FRESH | {"cache_prompt": True})).usage
    assert again.cached_tokens == first.prompt_tokens - 1


def test_images_and_sounds_in_one_prompt(seeing: superllama.LLM) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    prompt = "<__media__> is <__media__> a"
    found = [
        seeing.generate({"prompt": prompt, "multimodal_data": both}, **FRESH)
        for both in ([pixels, wav(1)], [wav(1), pixels])
    ]
    assert found[0].logprobs != found[1].logprobs
    assert found[0].usage.prompt_tokens == found[1].usage.prompt_tokens
    alone = seeing.generate(
        {"prompt": "<__media__> a", "multi_modal_data": {"audio": (samples(1), SOUND_RATE)}}, **FRESH
    )
    assert alone.logprobs == seeing.generate({"prompt": "<__media__> a", "audio": wav(1)}, **FRESH).logprobs


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (np.zeros((2, 2), np.uint8), "wrong kind: image .*, not sound"),
        ((np.zeros((2, 2)), 16000), "one channel"),
        ((np.zeros(4), 0), "one channel"),
        (b"no sound", "no image and no sound"),
        (wav(1)[:30], "damaged"),
    ],
)
def test_what_is_no_sound(value: Any, why: str, seeing: superllama.LLM) -> None:
    with pytest.raises(superllama.PromptError, match=why):
        seeing.chat(asked({"type": "audio", "audio": value}))


def test_models_that_hear_nothing(llm: superllama.LLM, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(superllama.ModelError, match="takes no sounds"):
        llm.chat(asked(wav(1)))
    sees = tiny_projector.write_projector(tmp_path / "sees.gguf", hears=False)
    with superllama.LLM(tiny_model, mmproj=sees, n_ctx=256, n_threads=1, chat_template="chatml") as deaf:
        for ask in (
            lambda: deaf.chat(asked(wav(1))),
            lambda: deaf.generate({"prompt": "<__media__> a", "multimodal_data": [wav(1)]}),
        ):
            with pytest.raises(superllama.ModelError, match="takes images, and no sounds"):
                ask()
