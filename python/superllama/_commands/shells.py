"""What a shell reads, so that it completes the commands of this package: `superllama completion bash` prints it."""

from __future__ import annotations

from pathlib import Path

PROGRAMS = {  # command -> program of llama.cpp
    "superllama-cli": "llama-cli",
    "superllama-completion": "llama-completion",
    "superllama-server": "llama-server",
    "superllama-bench": "llama-bench",
    "superllama-perplexity": "llama-perplexity",
    "superllama-quantize": "llama-quantize",
    "superllama-rpc-server": "ggml-rpc-server",
}


def script(shell: str) -> str:
    """The text for bash, zsh or fish."""
    text = (Path(__file__).with_name("scripts") / f"superllama.{shell}").read_text()
    return text.replace("@commands@", " ".join(["superllama", *PROGRAMS]))
