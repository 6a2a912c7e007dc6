"""The library's messages in the words of whoever reads them: its parameters are flags there, and names in Python.

The library names what to change as its programs spell it ("raise --mem-budget"). This is the one place where that
becomes what a caller of the package can type, and the other way for the `superllama` command.
"""

from __future__ import annotations

import re

# flags whose names in Python are not theirs with underscores
_NAMES = {
    "batch-size": "n_batch",
    "cache-type-k": "type_k",
    "cache-type-v": "type_v",
    "cpu-moe": "override_tensor",
    "ctx-size": "n_ctx",
    "device": "devices",
    "gpu-layers": "n_gpu_layers",
    "metrics-interval": "metrics_interval_ms",
    "n-gpu-layers": "n_gpu_layers",
    "no-repack": "use_extra_bufts=False",
    "parallel": "n_seq_max",
    "repack": "use_extra_bufts",
    "rpc": "add_rpc_server()",
    "threads": "n_threads",
    "ubatch-size": "n_ubatch",
}
_SHORT = {"-nkvo": "offload_kqv=False", "-ngl": "n_gpu_layers", "-np": "n_seq_max", "-ub": "n_ubatch"}
# the flags of `superllama plan`, by their names in Python
_PLAN_FLAGS = {"mem_budget": "--mem-budget", "n_ctx": "-c", "n_ubatch": "-ub", "n_threads": "-t", "n_parallel": "-np"}


def in_python(message: str) -> str:
    """The message with the names of parameters instead of flags."""
    if " -" not in message and not message.startswith("-") and "--" not in message:
        return message
    message = re.sub(r"(?<![^\s(])(-[a-z]+)\b(?!-)", lambda m: _SHORT.get(m[1], m[1]), message)
    message = re.sub(
        r"--override-kv ([\w.]+)=bool:(true|false)",
        lambda m: f"override_kv={{{m[1]!r}: {m[2].capitalize()}}}",
        message,
    )
    return re.sub(r"(?<![\w-])--([a-z][a-z0-9]*(?:-[a-z0-9]+)*)\b", lambda m: _name(m[1]), message)


def as_flags(message: str) -> str:
    """The message with the flags of `superllama plan` instead of the names of parameters."""
    return re.sub(
        r"\b(" + "|".join(_PLAN_FLAGS) + r")(=)?", lambda m: _PLAN_FLAGS[m[1]] + (" " if m[2] else ""), message
    )


def _name(flag: str) -> str:
    return _NAMES.get(flag, flag.replace("-", "_"))
