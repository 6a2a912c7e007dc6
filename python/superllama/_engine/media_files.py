"""An image or a sound as the bytes of its file, from whatever people have it in: a path, bytes, base64, a PIL.Image, an
array. Its kind, and an image's size, are read from its first bytes."""

from __future__ import annotations

import base64
import binascii
import dataclasses
import io
import os
import shutil
import struct
import urllib.parse
from typing import Any, Literal

from .._errors import PromptError
from .._files import open_regular

Kind = Literal["image", "audio"]
NAMES: dict[Kind, str] = {"image": "image", "audio": "sound"}

MOST_BYTES = 256 << 20  # of a file: a request holds it several times
MOST_PIXELS = 100_000_000  # each takes six bytes and more before the image is scaled for the model
_LONGEST_PATH = 4096

_BEGINNINGS: tuple[tuple[bytes, Kind, str], ...] = (
    (b"\x89PNG\r\n\x1a\n", "image", "png"),
    (b"\xff\xd8\xff", "image", "jpeg"),
    (b"GIF8", "image", "gif"),
    (b"BM", "image", "bmp"),
    (b"P5", "image", "x-portable-anymap"),
    (b"P6", "image", "x-portable-anymap"),
    (b"fLaC", "audio", "flac"),
    (b"ID3", "audio", "mpeg"),
)


@dataclasses.dataclass(frozen=True)
class MediaFile:
    """A file that the library reads."""

    kind: Kind
    format: str
    data: bytes

    @property
    def base64(self) -> str:
        """Its bytes as JSON can hold them."""
        return base64.b64encode(self.data).decode()

    @property
    def url(self) -> str:
        """The same as a URL."""
        return f"data:{self.kind}/{self.format};base64,{self.base64}"


def media_file(value: Any, where: str) -> MediaFile:
    """The file that a value holds or names. Raises: PromptError for what is none, cannot be read, or is too large."""
    data = _bytes_of(value, where)
    if len(data) > MOST_BYTES:
        raise PromptError(f"{where} has more than {MOST_BYTES >> 20} MiB, which is the most that is taken")
    found = _format_of(data)
    if found is None:
        raise PromptError(
            f"{where} is no image and no sound that can be read: it begins with {data[:12]!r}. PNG, JPEG, GIF, BMP and "
            "PNM can be read, WAV, MP3 and FLAC; other images as PIL.Image.open(file)"
        )
    kind, name = found
    if name == "webp" and shutil.which("ffmpeg") is None:
        raise PromptError(
            f"{where} is WebP, which the program ffmpeg reads, and that is not here; give PIL.Image.open(file), or "
            "save it as PNG or JPEG"
        )
    width, height = _size_of(data, name)
    if width * height > MOST_PIXELS:
        raise PromptError(
            f"{where} has {width} x {height} pixels; at most {MOST_PIXELS // 1_000_000} million are taken. Scale it "
            "down: the model gets it much smaller in any case"
        )
    return MediaFile(kind, name, data)


# ---------------------------------------------------------------- where it comes from


def _bytes_of(value: Any, where: str) -> bytes:
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    if isinstance(value, os.PathLike):
        return _read(os.fspath(value), where)
    if isinstance(value, str):
        return _from_text(value, where)
    if hasattr(value, "save") and hasattr(value, "convert"):
        return _from_pil(value, where)
    if hasattr(value, "__array_interface__"):
        return _from_pixels(value, where)
    if isinstance(value, tuple) and len(value) == 2 and hasattr(value[0], "__array_interface__"):
        return _from_samples(value[0], value[1], where)
    raise PromptError(
        f"{where} must be a path, bytes, base64, a data: URL, a PIL.Image or an array, not {type(value).__name__}"
    )


def _from_text(text: str, where: str) -> bytes:
    if text.startswith("data:"):
        head, _, rest = text.partition(",")
        data = _from_base64(rest) if head.endswith(";base64") else None
        if not data:
            raise PromptError(f"{where} is a data: URL without base64; it is data:image/png;base64,... with the bytes")
        return data
    if text.startswith("file:"):
        from urllib.request import url2pathname  # which brings http and ssl

        return _read(url2pathname(urllib.parse.urlsplit(text).path), where)
    if len(text) < _LONGEST_PATH and os.path.exists(text):  # noqa: PTH110 # a Path raises for what is no path at all
        return _read(text, where)
    data = _from_base64(text)
    if not data or _format_of(data) is None:
        raise PromptError(f"{where} is {text[:60]!r}: there is no such file, and it is no URL and no image in base64")
    return data


def _from_base64(text: str) -> bytes | None:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None


def _read(path: str | bytes, where: str) -> bytes:
    try:
        with open_regular(path, PromptError) as file:
            return file.read(MOST_BYTES + 1)
    except OSError as e:
        raise PromptError(f"{where}: cannot read {os.fsdecode(path)}: {e.strerror}") from e


def _from_pil(image: Any, where: str) -> bytes:
    file = io.BytesIO()
    try:
        image.convert("RGB").save(file, "PNG", compress_level=1)
    except (OSError, ValueError) as e:  # an image is read when it is first used
        raise PromptError(f"{where}: the image cannot be converted: {e}") from e
    return file.getvalue()


def _from_pixels(array: Any, where: str) -> bytes:
    """An image of rows of pixels, as PNM: a line of text before them."""
    shape, kind = array.__array_interface__["shape"], array.__array_interface__["typestr"]
    is_grey, is_colour = len(shape) == 2, len(shape) == 3 and shape[2] == 3
    if kind != "|u1" or not (is_grey or is_colour):
        raise PromptError(
            f"{where} is an array of {kind} with the shape {tuple(shape)}; an image is uint8, (height, width, 3) or "
            "(height, width)"
        )
    return f"P{6 if is_colour else 5} {shape[1]} {shape[0]} 255\n".encode() + bytes(array.tobytes())


def _from_samples(array: Any, rate: Any, where: str) -> bytes:
    """A sound of samples between -1 and 1, or of 16 bits, as WAV."""
    import wave

    import numpy as np

    samples = np.asarray(array)
    if samples.ndim != 1 or not isinstance(rate, int | float) or not rate > 0:
        raise PromptError(f"{where} must be (samples, rate): one channel, and how many samples a second there are")
    if samples.dtype != np.int16:
        samples = (np.clip(samples, -1, 1) * 32767).astype(np.int16)
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, int(rate), 0, "NONE", ""))
        out.writeframes(samples.astype("<i2").tobytes())
    return file.getvalue()


# ---------------------------------------------------------------- what it is


def _format_of(data: bytes) -> tuple[Kind, str] | None:
    for beginning, kind, name in _BEGINNINGS:
        if data.startswith(beginning):
            return kind, name
    if data[:4] == b"RIFF" and data[8:12] in (b"WAVE", b"WEBP"):
        return ("audio", "wav") if data[8:12] == b"WAVE" else ("image", "webp")
    if len(data) > 1 and data[0] == 0xFF and data[1] >= 0xE0:  # a frame of MP3 begins so
        return "audio", "mpeg"
    return None


def _size_of(data: bytes, name: str) -> tuple[int, int]:
    """Width and height, as far as they can be told before it is decoded."""
    try:
        if name == "png":
            return struct.unpack_from(">II", data, 16)
        if name == "gif":
            return struct.unpack_from("<HH", data, 6)
        if name == "bmp":
            width, height = struct.unpack_from("<ii", data, 18)
            return abs(width), abs(height)  # a negative height: the rows run from the top
        if name == "jpeg":
            return _jpeg_size(data)
    except struct.error:  # it is cut, and the library will say so
        pass
    return 0, 0


def _jpeg_size(data: bytes) -> tuple[int, int]:
    at = 2
    while at < len(data) and data[at] == 0xFF:
        marker, length = struct.unpack_from(">xBH", data, at)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # the beginning of a frame
            height, width = struct.unpack_from(">HH", data, at + 5)
            return width, height
        at += 2 + length
    return 0, 0
