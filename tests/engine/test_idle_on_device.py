"""A conversation that waits leaves a device: its KV goes to host memory when another one begins, and comes back before
its batch."""

from __future__ import annotations

from pathlib import Path

import pytest
from rpc_devices import answer_beside_server
from running import Runner

N_LONG = 900  # tokens; a device has memory for 512 at least

SCRIPT = f"""
import json, sys
import numpy as np
import superllama

superllama.add_rpc_server(sys.argv[2])
rng = np.random.default_rng(1)
long, short = (rng.integers(1000, 9000, n).tolist() for n in ({N_LONG}, 20))
steps = []
with superllama.LLM(sys.argv[1], n_parallel=2, n_threads=1, n_ctx=2048, dynamic_layers=True, paged_kv=True) as llm:
    for prompt in (long, short, [*long, 11, 12]):
        answer = llm.generate(prompt, max_tokens=2, temperature=0)
        m = llm.metrics()
        steps.append({{"cached": answer.usage.cached_tokens, "vram": m.vram_own_bytes, "layers": m.gpu_layers_active,
                      "prompts": m.memory_by_tag["prompt_cache"], "mem": sum(m.memory_by_tag.values()),
                      "budget": m.mem_budget_bytes}})
print(json.dumps(steps))
"""


@pytest.mark.usefixtures("no_gpu")
def test_an_idle_conversation_leaves_the_device(demo_model: Path, run_python: Runner) -> None:
    begun, idle, back = answer_beside_server(run_python, SCRIPT, demo_model)
    assert begun["layers"] == idle["layers"] == back["layers"] == 30
    assert begun["prompts"] == 0 < back["prompts"] < idle["prompts"]
    assert idle["vram"] < begun["vram"]  # the long one's part is the host's now
    assert back["vram"] == begun["vram"]
    assert back["cached"] >= N_LONG - 1  # nothing of it was computed again
    assert all(step["mem"] <= step["budget"] for step in (begun, idle, back))
