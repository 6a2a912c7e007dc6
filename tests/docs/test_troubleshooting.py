"""Messages that the page on troubleshooting explains are messages that there are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/troubleshooting.md").read_text()
OURS, THEIRS = PAGE.split("## From llama.cpp")
MESSAGES = re.findall(r"^\| `([^`]+)` \|", OURS, re.MULTILINE)
# what stands between two parts of a text in the source, or for a value in it
BETWEEN_LITERALS = re.compile(r'"\s*\n\s*f?"|\\(?=")|" \+ ')


def sources() -> str:
    files = [*ROOT.glob("src/**/*.cpp"), *ROOT.glob("src/**/*.h"), *ROOT.glob("python/superllama/**/*.py")]
    return "\n".join(BETWEEN_LITERALS.sub("", file.read_text()) for file in files)


@pytest.fixture(scope="module")
def text() -> str:
    return sources()


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_is_in_the_source(message: str, text: str) -> None:
    missing = [part for part in message.split("...") if part.strip(" ;:,()") not in text]
    assert not missing


def test_messages_were_found() -> None:
    assert len(MESSAGES) > 30
    assert len(MESSAGES) == OURS.count("\n| `"), "a row that is read differently"
