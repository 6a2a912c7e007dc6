"""How much memory a KV cache needs, so that one that cannot fit is refused before anything is allocated.

The library zeroes the whole cache when it makes it; on a system that promises more memory than it has, a
cache that is too big ends the process instead of failing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._c_params import ENUMS
from ._errors import ContextError
from ._memory import devices, memory
from ._native import lib

if TYPE_CHECKING:
    from ._model import Model
    from ._params import ContextParams

N_CELLS_PAD = 256  # the library rounds n_ctx up to a multiple


def kv_bytes_per_token(model: Model, params: ContextParams) -> int:
    """Bytes of K and V that one token needs in all layers: exact for a plain transformer, a lower bound for
    models whose layers differ (sliding windows, hybrids), 0 for recurrent ones."""
    with model._use() as c:
        if lib.llama_model_is_recurrent(c) or not lib.llama_model_has_decoder(c):
            return 0
        n_embd_head = lib.llama_model_n_embd(c) // max(lib.llama_model_n_head(c), 1)
        windowed = lib.llama_model_n_swa(c) > 0 and not params.swa_full
        n_layer = max(1, model.n_layer // 8) if windowed or lib.llama_model_is_hybrid(c) else model.n_layer

    def number(key: str, default: int) -> int:
        value = model.metadata.get(f"{model.architecture}.attention.{key}", "")
        return int(value) if value.isdigit() else default

    type_k, type_v = ENUMS["type_k"][params.type_k], ENUMS["type_v"][params.type_v]
    if rank := number("kv_lora_rank", 0):
        return n_layer * int(lib.ggml_row_size(type_k, rank))
    n_head_kv = number("head_count_kv", 1)
    n_k = n_head_kv * number("key_length", n_embd_head)
    n_v = n_head_kv * number("value_length", n_embd_head)
    return n_layer * int(lib.ggml_row_size(type_k, n_k) + lib.ggml_row_size(type_v, n_v))


def check_kv_fits(model: Model, params: ContextParams, n_ctx: int) -> None:
    """Raises: ContextError, with the numbers, if a cache of `n_ctx` cells is larger than the memory there is."""
    per_token = kv_bytes_per_token(model, params)
    available = memory().host_available
    if not per_token or not available or params.paged_kv:
        return  # pages take memory as they are used
    if params.offload_kqv:
        available += sum(d.memory_free for d in devices() if d.kind == "gpu")
    n_cells = -(-n_ctx // N_CELLS_PAD) * N_CELLS_PAD
    if n_cells * per_token > available:
        n_fits = available // per_token // N_CELLS_PAD * N_CELLS_PAD
        raise ContextError(
            f"n_ctx={n_ctx} needs {n_cells * per_token / 1e9:.1f} GB for its KV cache ({per_token} bytes a token), but "
            f"{available / 1e9:.1f} GB of memory are available; n_ctx={n_fits} would fit, and type_k='q8_0', "
            "type_v='q8_0' halve what a token needs"
        )
