"""Odd requests to a server's control plane, while it serves: each is answered as openapi.json says, or refused with a
reason, and afterwards the server goes on with the same texts.

    python tests/fuzz/fuzz_control.py --minutes 10
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import jsonschema
import tiny_model as tiny
from json_mutations import damaged, dumped, mutated
from rounds import Outcome, command_line, generator
from served import Served, post
from serving import HttpServer

from superllama._openapi import document

SIZES: tuple[Any, ...] = (
    "64MiB", "60%", "auto", 2**26, 2**40, 10**30, 0, -1, 1.5, "", "0", "-1", "1e400", "100%", "101%", "8 GiB",
    "8GiB,8GiB", "é", "nul\0", "1" * 5000, None, True, [], ["1GiB"], ["auto"] * 17, {"a": 1},
)  # fmt: skip
FIELDS = dict.fromkeys(("mem_budget", "vram_budget", "kv_budget", "model"), SIZES)
ACTIONS = ("pause", "resume", "drain")
SITES = ("cross-site", "same-site", "same-origin", "none", "")
DOCUMENT = document()


def control(server: HttpServer) -> object:
    """It serves again, with the budget that it had, and says the same."""
    server.settled("/superllama/resume", {})
    server.request("/superllama/budget", {"mem_budget": "64MiB"})
    body = {"prompt": "the cat", "n_predict": 3, "temperature": 0, "cache_prompt": False}
    status, answer = server.request("/completion", body)
    return status, answer.get("content", answer)


def described(path: str, method: str, answer: tuple[int, bytes] | None) -> str:
    """What an answer has that the document does not say; "" where all is as it says."""
    if answer is None:
        return "no answer"
    status, body = answer
    responses = DOCUMENT["paths"][path][method]["responses"]
    if str(status) not in responses:
        return f"status {status}"
    schema = responses[str(status)]["content"]["application/json"]["schema"]
    wrong = list(jsonschema.Draft202012Validator({**schema, **DOCUMENT}).iter_errors(json.loads(body)))
    return wrong[0].message if wrong else ""


class Control:
    def __init__(self, seed: int, folder: Path) -> None:
        self.seed = seed
        model = tiny.write_llama(folder / "tiny.gguf")
        flags = ["-np", 2, "-c", 512, "--mem-budget", "64MiB", "--metrics", "--spill-dir", folder]
        self._served = Served(folder, control, model, *flags)

    def case(self, rng: random.Random) -> tuple[str, str, bytes, str]:
        kind = rng.randrange(6)
        site = rng.choice(SITES)
        headers = [f"Sec-Fetch-Site: {site}"] if site else []
        if kind < 3:
            body, what = mutated(rng, {"mem_budget": rng.choice(SIZES)}, FIELDS, rng.choice((0, 1, 2)))
            data = dumped(body)
            if rng.randrange(5) == 0:
                data, note = damaged(rng, data)
                what += note
            return "/superllama/budget", "post", post("/superllama/budget", data, *headers), f"{what} {data[:200]!r}"
        if kind < 5:
            path = f"/superllama/{rng.choice(ACTIONS)}"
            data = rng.choice((b"", b"{}", b"[]", b"{", b"x" * 100_000))
            return path, "post", post(path, data, *headers), f"{path} {data[:20]!r}"
        path = rng.choice(("/superllama", "/health"))
        return path, "get", f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode(), path

    def run(self, number: int) -> Outcome:
        path, method, request, what = self.case(generator(self.seed, number))
        outcome = self._served.ask(number, what, request)
        if not outcome.wrong and (wrong := described(path, method, self._served.answer)):
            outcome.verdict, outcome.reason = "not as described", wrong
        return outcome

    def close(self) -> None:
        self._served.close()


if __name__ == "__main__":
    sys.exit(command_line(__doc__, Control))
