"""Odd requests to the HTTP server: each is answered, or refused with a reason, and the next one has its usual answer.

    python tests/fuzz/fuzz_http.py --minutes 60            # as long as that, from seed 1
    python tests/fuzz/fuzz_http.py --seed 7 --only 1234    # one request again

Bodies are valid ones with a few changes; every tenth request is not even HTTP.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny_model as tiny
from gguf_parts import STRING, U32, read, write
from json_mutations import NUMBERS, damaged, dumped, mutated
from rounds import Outcome, command_line, generator
from served import Served, post
from serving import HttpServer

TEMPLATE = (
    "{%- if tools %}<tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}{% for c in m.tool_calls %}<tool_call>"
    '{{ {"name": c.function.name, "arguments": c.function.arguments} | tojson }}</tool_call>{% endfor %}'
    "{% else %}{{ m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PROMPTS: tuple[Any, ...] = (
    "the cat", "", [5, 6, 7], [5, "a", 7], [[5, 6], "b"], ["a", "b"], {"prompt_string": "a"}, [303], [-1], [2**31],
    [5] * 600, "a " * 600, [], [[]], [5, None], [1.5], [[5], [6]] * 20,
    {"prompt_string": "a", "multimodal_data": ["AAAA"]},
)  # fmt: skip
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
GRAMMARS = ('root ::= "a"+', 'root ::= [a-z]{2,5} "x"?', "root ::= (", "root ::= root", "", 'root ::= "a"{1,100000}')
COUNTS = (0, 1, 2, 4, -1, -2, 64, 300, 2**24, 2**31 - 1)

# By kind of request: fields that it may have, with values that are right, or nearly.
SAMPLING: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys((
        "n_predict", "max_tokens", "max_completion_tokens", "top_k", "repeat_last_n", "dry_penalty_last_n", "n_keep",
        "dry_allowed_length", "n_discard", "n_indent", "n_cache_reuse", "n_probs", "min_keep", "mirostat", "seed", "n",
        "n_cmpl", "id_slot", "t_max_predict_ms", "sse_ping_interval", "top_logprobs", "logprobs", "n_prev",
        "reasoning_budget_tokens", "thinking_budget_tokens",
    ), COUNTS),
    **dict.fromkeys((
        "temperature", "top_p", "min_p", "typical_p", "top_n_sigma", "xtc_probability", "xtc_threshold", "dry_base",
        "dynatemp_range", "dynatemp_exponent", "repeat_penalty", "frequency_penalty", "presence_penalty",
        "dry_multiplier", "mirostat_tau", "mirostat_eta", "adaptive_target", "adaptive_decay",
    ), NUMBERS),
    **dict.fromkeys((
        "stream", "cache_prompt", "post_sampling_probs", "ignore_eos", "return_tokens", "return_progress", "verbose",
        "timings_per_token", "grammar_lazy", "echo", "backend_sampling", "reasoning_control", "parallel_tool_calls",
        "add_generation_prompt", "logprobs",
    ), (True, False)),
    "stop": ([], ["a"], "a", ["", "a"], ["a"] * 2000, ["\n", "</s>"], [[]], [5]),
    "logit_bias": ([[5, 1e30]], [[5, False]], [["the", -5]], [[10**9, 1]], {"5": -100}, {"the": False},
                   [[5, -1e30]] * 99, [[i, False] for i in range(303)], [[5], [5, 6, 7]]),
    "samplers": (["top_k", "temperature"], [], "edskypmxt", ["top_k"] * 300, ["unheard of"], "zzz", ["mirostat"]),
    "grammar": GRAMMARS,
    "grammar_triggers": ([{"type": 1, "value": "a"}], [{"type": 2, "value": "(((("}], [{"type": 3, "value": "(a*)*b"}],
                         [{"type": 0, "value": "a", "token": 5}], [{"type": 99, "value": "a"}], [{}]),
    "preserved_tokens": (["a"], ["<s>"], [5]),
    "json_schema": (SCHEMA, {}, {"type": "string", "pattern": "^a+$"}, {"$ref": "#"}, True, "x"),
    "response_format": ({"type": "json_object"}, {"type": "json_object", "schema": SCHEMA}, {"type": "text"},
                        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}, {"type": "x"}, {}),
    "lora": ([{"id": 0, "scale": 1.0}], [{"id": 1, "scale": 1.0}], [{"id": -1, "scale": 1}], [{"id": 0, "scale": 1e30}],
             [], [{"id": 0}] * 300),
    "response_fields": (["content"], ["generation_settings/n_predict"], ["/"], ["a//b", ""]),
    "dry_sequence_breakers": (["\n"], [], ["a" * 100], ["", "a"]),
    "stream_options": ({"include_usage": True}, {}),
    "reasoning_format": ("none", "deepseek", "auto", "x"),
    "reasoning_effort": ("none", "high"),
    "reasoning_budget_start_tag": ("<a>", ""),
    "reasoning_budget_end_tag": ("<b>", ""),
    "reasoning_budget_message": ("a", "a " * 300),
    "continue_final_message": (True, False, "content", "x"),
    "prompt": PROMPTS,
}  # fmt: skip
CHAT: dict[str, tuple[Any, ...]] = {
    **SAMPLING,
    "tools": ([TOOL], [], [TOOL] * 20, [{"type": "function", "function": {"name": "f"}}], [{"type": "x"}]),
    "tool_choice": ("auto", "none", "required", {"type": "function", "function": {"name": "f"}}, {"type": "any"}),
    "tool_calls": ([CALL], [], [CALL] * 5),
    "content": ("a", None, [{"type": "text", "text": "a"}], [{"type": "image_url", "image_url": {"url": "data:,"}}], [],
                [{"type": "input_audio", "input_audio": {"data": "AA", "format": "wav"}}], [{"type": "x"}]),
    "role": ("user", "system", "assistant", "tool", "x", ""),
    "arguments": ('{"a": 1}', "{", "", "[" * 3000, {"a": 1}),
    "chat_template_kwargs": ({"enable_thinking": False}, {"enable_thinking": "x"}, {"messages": 1}, {}),
    "reasoning_content": ("a",),
    "thinking": ({"type": "enabled", "budget_tokens": 5}, {"type": "x"}),
    "stop_sequences": (["a"], [5]),
    "instructions": ("a",),
    "tool_call_id": ("1",),
}  # fmt: skip
TEXT: dict[str, tuple[Any, ...]] = {
    "content": PROMPTS, "input": PROMPTS, "tokens": PROMPTS, "documents": PROMPTS, "texts": PROMPTS, "query": ("a", ""),
    "add_special": (True, False), "parse_special": (True, False), "with_pieces": (True, False), "top_n": COUNTS,
    "encoding_format": ("float", "base64", "x"), "embd_normalize": COUNTS, "return_text": (True, False),
    "input_prefix": ("a", "a " * 600, ""), "input_suffix": ("a", "a " * 600, ""), "id": COUNTS, "scale": NUMBERS,
    "input_extra": ([], [{"text": "a", "filename": "b"}], [{"text": "a " * 600}], [{}]), "dimensions": COUNTS,
    "filename": ("x", "y", "", ".", "..", "../x", "a/b", "/etc/passwd", "nul\0", "a" * 300, "é", "no such file"),
}  # fmt: skip

MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}]
CALLED = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [CALL]},
          {"role": "tool", "tool_call_id": "1", "content": "2"}]  # fmt: skip
PARTS = [{"type": "input_text", "text": "a"}]
GENERATING: list[tuple[str, Any, dict[str, tuple[Any, ...]]]] = [
    ("/completion", {"prompt": "the cat", "n_predict": 4}, SAMPLING),
    ("/completion", {"prompt": [5, 6, 7], "n_predict": 4, "n_probs": 3, "stream": True}, SAMPLING),
    ("/completion", {"prompt": "a", "n_predict": 4, "stop": ["x"], "samplers": ["top_k"]}, SAMPLING),
    ("/completion", {"prompt": "a", "n_predict": 4, "logit_bias": [[5, 1.0]]}, SAMPLING),
    ("/completion", {"prompt": "a", "n_predict": 4, "json_schema": SCHEMA}, SAMPLING),
    ("/completion", {"prompt": ["a", "b"], "n_predict": 2, "grammar": 'root ::= "a"+'}, SAMPLING),
    ("/v1/completions", {"prompt": "the cat", "max_tokens": 4, "logprobs": 2}, SAMPLING),
    ("/v1/completions", {"prompt": "the cat", "max_tokens": 4, "n": 2, "stream": True}, SAMPLING),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4}, CHAT),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4, "tools": [TOOL], "tool_choice": "auto"}, CHAT),
    ("/v1/chat/completions", {"messages": CALLED, "max_tokens": 4, "tools": [TOOL], "stream": True}, CHAT),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4, "logprobs": True, "top_logprobs": 2}, CHAT),
    ("/v1/chat/completions", {"messages": MESSAGES, "max_tokens": 4, "response_format": {"type": "json_object"}}, CHAT),
    ("/v1/chat/completions/input_tokens", {"messages": CALLED}, CHAT),
    ("/v1/chat/completions/control", {"id": "x", "action": "reasoning_end"}, CHAT),
    ("/v1/responses", {"input": "hi", "max_output_tokens": 4, "instructions": "s"}, CHAT),
    ("/v1/responses", {"input": [{"role": "user", "content": PARTS}], "stream": True, "max_output_tokens": 4}, CHAT),
    ("/v1/messages", {"messages": MESSAGES[1:], "max_tokens": 4, "system": "s"}, CHAT),
    ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 4,
                      "stream": True, "tools": [{"name": "f", "input_schema": SCHEMA}]}, CHAT),
    ("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "hi"}]}, CHAT),
    ("/apply-template", {"messages": CALLED, "tools": [TOOL]}, CHAT),
    ("/infill", {"input_prefix": "a", "input_suffix": "b", "prompt": "c", "n_predict": 4}, TEXT | SAMPLING),
    ("/tokenize", {"content": "the cat", "add_special": True, "with_pieces": True}, TEXT),
    ("/tokenize", {"content": [5, "a"], "parse_special": True}, TEXT),
    ("/detokenize", {"tokens": [5, 6, 7]}, TEXT),
    ("/embedding", {"content": "the cat"}, TEXT),
    ("/embeddings", {"input": ["a", [5, 6]], "embd_normalize": 2}, TEXT),
    ("/v1/embeddings", {"input": "a", "encoding_format": "base64"}, TEXT),
    ("/slots/0?action=save", {"filename": "x"}, TEXT),
    ("/slots/1?action=restore", {"filename": "x"}, TEXT),
    ("/slots/0?action=erase", {}, TEXT),
    ("/props", {"a": 1}, TEXT),
    ("/lora-adapters", [{"id": 0, "scale": 0.5}], TEXT),
    ("/v1/systemone", {"questions": []}, TEXT),
]  # fmt: skip
RANKING: list[tuple[str, Any, dict[str, tuple[Any, ...]]]] = [
    ("/rerank", {"query": "a", "documents": ["a", "b c"], "top_n": 1}, TEXT),
    ("/v1/rerank", {"query": "a", "texts": ["a", "b c"], "return_text": True}, TEXT),
    ("/embedding", {"content": "a b"}, TEXT),
    ("/v1/embeddings", {"input": ["a", "b"]}, TEXT),
    ("/completion", {"prompt": "a", "n_predict": 2}, SAMPLING),
]
PATHS = (
    "/slots/-1?action=save", "/slots/99999999999999999999?action=erase", "/slots/x?action=restore",
    "/slots/7?action=save", "/slots/0?action=x", "/slots/0", "/slots/0?action=erase&action=save", "/nothing", "/%00",
    "/../etc/passwd", "/%ff",
)  # fmt: skip


def not_http(rng: random.Random, path: str, body: bytes) -> tuple[bytes, str]:
    """A request of which the wire's part is broken."""
    whole = post(path, body)
    head, _, _ = whole.partition(b"\r\n\r\n")
    n = rng.choice((0, 1, len(body) - 1, len(body) + 1, len(body) + 10_000, 2**31, 2**63, 2**64, -1, "x", ""))
    odd_chunk = rng.choice((b"ffffffffffffffff\r\n", b"-1\r\n", b"zz\r\n", b"\r\n", b"7;" + b"x" * 99999))
    chunked = head.rsplit(b"\r\n", 1)[0] + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
    parts = b"".join(b"%x\r\n%s\r\n" % (len(body[i : i + 7]), body[i : i + 7]) for i in range(0, len(body), 7))
    long = "a: " + "x" * rng.choice((8000, 9000, 10**6))
    headers = (long, ": x", "no colon", "é: é", *[f"a{i}: b" for i in range(300)])
    requests = (
        (head.rsplit(b" ", 1)[0] + f" {n}\r\n\r\n".encode() + body, f"Content-Length: {n}"),
        (chunked + parts + b"0\r\n\r\n", "chunked"),
        (chunked + parts[: rng.randrange(len(parts) + 1)], "chunked, cut off"),
        (chunked + odd_chunk + parts, "odd chunk"),
        (post(path, body, *rng.sample(headers, rng.choice((1, 3, 250)))), "odd headers"),
        (post(path, body, "Content-Length: 3"), "two lengths"),
        (post(path, body, "Transfer-Encoding: chunked"), "two kinds of length"),
        (post(path, body, "Content-Encoding: " + rng.choice(("gzip", "br", "x"))), "said to be compressed"),
        (post(path, body, "Content-Type: multipart/form-data; boundary=x"), "said to be a form"),
        (post(path, body, "Expect: 100-continue"), "expects to go on"),
        (rng.choice((b"GET", b"PUT", b"DELETE", b"PRI", b"\xff", b"", b"POST" * 9000)) + whole[4:], "another method"),
        (whole.replace(b"HTTP/1.1", rng.choice((b"HTTP/1.0", b"HTTP/9.9", b"", b"\0"))), "another version"),
        (post(path + "?" + "a" * rng.choice((10, 9000, 10**6)), body), "a long address"),
        (whole.replace(b"\r\n", b"\n"), "other line ends"),
        (whole[: rng.randrange(len(whole))], "cut off"),
        (whole * 3, "three at once"),
        damaged(rng, whole),
        (rng.randbytes(rng.choice((1, 100, 100_000))), "noise"),
    )
    return rng.choice(requests)


def control(server: HttpServer) -> object:
    """What no request may change for the next one. But for adapters, which are switched on for all: off again."""
    server.request("/lora-adapters", [{"id": 0, "scale": 0}])
    body = {"prompt": "the cat", "n_predict": 3, "temperature": 0, "cache_prompt": False}
    status, answer = server.request("/completion", body)
    return status, answer.get("content", answer)


def control_ranks(server: HttpServer) -> object:
    return server.request("/rerank", {"query": "a", "documents": ["a", "b c"]})


class Http:
    def __init__(self, seed: int, folder: Path) -> None:
        self.seed = seed
        parts = read(tiny.write_llama(folder / "plain.gguf"))
        parts.set("tokenizer.chat_template", STRING, TEMPLATE.encode())
        for i, name in enumerate(("pre", "suf", "mid", "pad", "rep", "sep")):
            parts.set(f"tokenizer.ggml.fim_{name}_token_id", U32, 100 + i)
        model, lora, self._slots = folder / "tiny.gguf", tiny.write_lora(folder / "lora.gguf"), folder / "slots"
        model.write_bytes(write(parts))
        self._slots.mkdir()
        flags = [
            "-np",
            2,
            "-c",
            512,
            "--cache-ram",
            8,
            "--slots",
            "--props",
            "--metrics",
            "--timeout",
            20,
            "--sse-ping-interval",
            -1,
        ]
        flags += ["--embeddings", "--pooling", "mean", "--lora", lora, "--slot-save-path", self._slots]
        self._generating = Served(folder, control, model, *flags)
        ranking = tiny.write_bert(folder / "bert.gguf", pooling=tiny.gguf.PoolingType.RANK)
        self._ranking = Served(folder, control_ranks, ranking, "--rerank", "-c", 128, "-np", 2)
        self._folder, self._files = folder, set(folder.iterdir())

    def case(self, number: int) -> tuple[Served, bytes, str, bool]:
        rng = generator(self.seed, number)
        ranks = rng.random() < 0.1
        path, body, fields = rng.choice(RANKING if ranks else GENERATING)
        body = {**body, "seed": 1} if isinstance(body, dict) else body  # the same answer every time
        value, what = mutated(rng, body, fields, rng.choice((0, 1, 1, 1, 2, 2, 3, 5)))
        data = dumped(value)
        kind = rng.randrange(20)
        if kind == 0:
            data, note = damaged(rng, data)
            what += f"; {note}"
        elif kind == 1:
            path = rng.choice(PATHS)
        if kind in (2, 3):
            request, note = not_http(rng, path, data)
            return self._served(ranks), request, f"{path} {note}: {request[:300]!r}", False
        return self._served(ranks), post(path, data), f"{path} {what}: {data[:300]!r}", True

    def _served(self, ranks: bool) -> Served:
        return self._ranking if ranks else self._generating

    def run(self, number: int) -> Outcome:
        served, request, what, is_http = self.case(number)
        outcome = served.ask(number, what, request, is_http)
        if more := {f for f in self._folder.iterdir() if f not in self._files and f.suffix != ".log"}:
            outcome.verdict, outcome.reason = "wrote files", str(more)
        return outcome

    def close(self) -> None:
        self._generating.close()
        self._ranking.close()


if __name__ == "__main__":
    sys.exit(command_line(__doc__, Http))
