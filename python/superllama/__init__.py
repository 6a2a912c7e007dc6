"""superllama: run language models larger than memory, from Python.

    import superllama

    llm = superllama.LLM(superllama.demo_model())
    print(llm.generate("The capital of France is", max_tokens=8, temperature=0).text)

Importing the package is cheap: the library is loaded when something that needs it is used first.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._errors import (
    CancelledError,
    ConcurrentUseError,
    ContextError,
    DecodeError,
    DownloadError,
    Error,
    ForkedError,
    GrammarError,
    ModelError,
    PausedError,
    PreemptedError,
    PromptError,
    PromptTooLongError,
    RequestError,
    StateError,
    TemplateError,
)
from ._interrupts import interrupts_wait

if TYPE_CHECKING:
    from ._context import Context
    from ._demo import demo_model
    from ._engine.async_llm import AsyncLLM
    from ._engine.llm import LLM
    from ._engine.results import ChatCompletion, Chunk, Completion, Ranked, Timings, TokenLogprob, Usage
    from ._engine.server import Server
    from ._engine.tools import ToolCall
    from ._experts import Experts
    from ._generation import Piece, Summary
    from ._layers import Layer
    from ._memory import Device, Memory, add_rpc_server, devices, memory
    from ._metrics import Metrics
    from ._model import Lora, Model
    from ._params import ContextParams, ModelParams, SamplingParams
    from ._plan import Plan, plan
    from ._plan_nodes import NodesPlan, plan_nodes
    from ._quantize import quantize
    from ._scoring import Perplexity

__version__ = "0.1.0"

_HOME = {
    "AsyncLLM": "_engine.async_llm",
    "ChatCompletion": "_engine.results",
    "Chunk": "_engine.results",
    "Completion": "_engine.results",
    "Context": "_context",
    "ContextParams": "_params",
    "Device": "_memory",
    "Experts": "_experts",
    "LLM": "_engine.llm",
    "Layer": "_layers",
    "Lora": "_model",
    "Memory": "_memory",
    "Metrics": "_metrics",
    "Model": "_model",
    "ModelParams": "_params",
    "Perplexity": "_scoring",
    "Piece": "_generation",
    "Plan": "_plan",
    "NodesPlan": "_plan_nodes",
    "Ranked": "_engine.results",
    "SamplingParams": "_params",
    "Server": "_engine.server",
    "Summary": "_generation",
    "Timings": "_engine.results",
    "TokenLogprob": "_engine.results",
    "ToolCall": "_engine.tools",
    "Usage": "_engine.results",
    "add_rpc_server": "_memory",
    "demo_model": "_demo",
    "devices": "_memory",
    "memory": "_memory",
    "plan": "_plan",
    "plan_nodes": "_plan_nodes",
    "quantize": "_quantize",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "CancelledError",
    "ChatCompletion",
    "Chunk",
    "Completion",
    "ConcurrentUseError",
    "Context",
    "ContextError",
    "ContextParams",
    "DecodeError",
    "Device",
    "DownloadError",
    "Error",
    "Experts",
    "ForkedError",
    "GrammarError",
    "Layer",
    "Lora",
    "Memory",
    "Metrics",
    "Model",
    "ModelError",
    "ModelParams",
    "NodesPlan",
    "PausedError",
    "Perplexity",
    "Piece",
    "Plan",
    "PreemptedError",
    "PromptError",
    "PromptTooLongError",
    "Ranked",
    "RequestError",
    "SamplingParams",
    "Server",
    "StateError",
    "Summary",
    "TemplateError",
    "Timings",
    "TokenLogprob",
    "ToolCall",
    "Usage",
    "__version__",
    "add_rpc_server",
    "demo_model",
    "devices",
    "memory",
    "plan",
    "plan_nodes",
    "quantize",
]


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with interrupts_wait():
        value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
