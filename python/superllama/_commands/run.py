"""An answer to one prompt, by an engine in this process: nothing but the answer is on stdout.

llama.cpp's programs that answer once write more: a banner, timings, an "[end of text]".
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from .._demo import demo_model
from .._engine.llm import LLM
from .._engine.results import Chunk
from .._errors import Error
from .program_flags import Flag, flags_of

SYSTEM = ("-sys", "--system-prompt")
SYSTEM_FILE = ("-sysf", "--system-prompt-file")
SYSTEM_FLAGS = {*SYSTEM, *SYSTEM_FILE}  # what an answer takes beside the server's
MODEL = ("-m", "--model")
HF = ("-hf", "-hfr", "--hf-repo")


def answer(words: Sequence[str], prompt: str) -> None:
    """Print it while it comes; thoughts go to stderr. `words` are flags of superllama-server, the model's among them,
    and what says the system prompt. Raises: Error."""
    model, system, options = _sorted(words)
    options.setdefault("parallel", "1")
    with LLM(model or demo_model(), flags=options) as llm:
        templated = "chat_template" in options or "chat_template_file" in options or llm.facts.chat_template
        if templated:
            before = [{"role": "system", "content": system}] if system else []
            _show(llm.chat_stream([*before, {"role": "user", "content": prompt}]))
        else:  # a model that goes on with a text
            _show(llm.stream(f"{system}\n{prompt}" if system else prompt))


def _show(chunks: Iterable[Chunk]) -> None:
    thinks = False
    for chunk in chunks:
        if thinks and chunk.text:
            print("\n", file=sys.stderr, flush=True)
        thinks = bool(chunk.reasoning)
        print(chunk.reasoning, end="", file=sys.stderr, flush=True)
        print(chunk.text, end="", flush=True)
    print()


def _sorted(words: Sequence[str]) -> tuple[str | None, str | None, dict[str, str | bool]]:
    """The model, the system prompt, and options of an engine by their names there."""
    known = {name: flag for flag in flags_of("llama-server") for name in flag.names}
    model, system = None, None
    options: dict[str, str | bool] = {}
    rest = iter(words)
    for word in rest:
        flag = known.get(word)
        if word not in SYSTEM_FLAGS and (flag is None or flag.n_values > 1):
            raise Error(
                f"{word} means nothing where one prompt is answered, which takes the flags of superllama-server; "
                "superllama chat, or superllama-completion, may have it"
            )
        value = next(rest, None) if flag is None or flag.n_values else True
        if value is None:
            raise Error(f"{word} wants a value, and is the last word")
        if word in SYSTEM:
            system = str(value)
        elif word in SYSTEM_FILE:
            system = Path(str(value)).read_text(encoding="utf-8")
        elif word in MODEL:
            model = str(value)
        elif word in HF:
            model = f"hf:{value}"
        elif flag is not None:
            options[_own_name(flag, word)] = value
    return model, system, options


def _own_name(flag: Flag, word: str) -> str:
    """`-c` is ctx_size. Of a switch, the name that says the same: behind a short name stands the long one for it."""
    later = [*flag.names[flag.names.index(word) :], *flag.names]
    return next(name for name in later if name.startswith("--"))[2:].replace("-", "_")
