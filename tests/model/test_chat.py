"""Conversations: the prompt is that of llama-server, and what a sequence holds of it is not there twice."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_templates import TEMPLATES

import superllama
from superllama import Context, Model
from superllama._programs import find_program

USER = {"role": "user", "content": "Hi"}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "plain": [USER],
    "system": [{"role": "system", "content": "S"}, USER],
    "several turns": [USER, {"role": "assistant", "content": "Yes? "}, {"role": "user", "content": " a\n\nb é"}],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "you"}]}],
    "a name": [{**USER, "name": "bob"}],
    "developer": [{"role": "developer", "content": "D"}, USER],
    "a tool's answer": [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
    ],
    "an answer that was begun": [USER, {"role": "assistant", "content": "Well, "}],
    "empty content": [{"role": "user", "content": ""}],
    "thoughts": [
        USER,
        {"role": "assistant", "content": "<think>\nHm\n</think>\n\nYes"},
        {"role": "user", "content": "<a href='x'>&amp;</a> \"q\" \\ 日本"},
    ],
    "two tools": [
        {"role": "system", "content": [{"type": "text", "text": "S"}]},
        USER,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, CALL | {"id": "c2"}]},
        {"role": "tool", "content": "42", "tool_call_id": "c1"},
        {"role": "tool", "content": [{"type": "text", "text": "43"}], "tool_call_id": "c2"},
        {"role": "assistant", "content": "85"},
        {"role": "user", "content": "Thanks"},
    ],
}


@pytest.fixture(scope="module", params=TEMPLATES)
def server(request: pytest.FixtureRequest, demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The template, and a function that asks a server with it for the prompt of messages."""
    template = TEMPLATES[request.param]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [find_program("llama-server"), "-m", demo_model, "-c", "256", "-np", "1", "--port", str(port)]
    if template:
        file = tmp_path_factory.mktemp("template") / "t.jinja"
        file.write_text(template)
        command += ["--chat-template-file", file]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            break
        except OSError:  # it does not listen yet, or loads
            assert process.poll() is None
            time.sleep(0.1)

    def ask(messages: list[dict[str, Any]]) -> str:
        url = f"http://127.0.0.1:{port}/apply-template"
        body = json.dumps({"messages": messages}).encode()
        answer = urllib.request.urlopen(urllib.request.Request(url, body, {"Content-Type": "application/json"}))
        return str(json.loads(answer.read())["prompt"])

    yield template, ask
    process.terminate()
    process.wait(20)


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_prompt_is_that_of_the_server(
    demo: Model, server: tuple[str | None, Callable[[Any], str]], name: str
) -> None:
    template, ask = server
    assert demo.apply_chat_template(CONVERSATIONS[name], template=template) == ask(CONVERSATIONS[name])


def test_the_demo_model_has_a_system_turn_by_default(demo: Model) -> None:
    assert demo.apply_chat_template([USER]).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert demo.apply_chat_template([USER], add_generation_prompt=False).endswith("Hi<|im_end|>\n")
    assert demo.apply_chat_template([USER], template="chatml") == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ([], "no messages"),
        ("Hi", "list"),
        (USER, "list"),
        (["Hi"], "message 0 must have a 'role'"),
        ([{"content": "x"}], "message 0 must have a 'role'"),
        ([USER, {"role": "user"}], "message 1 must have a 'content'"),
        ([{"role": "user", "content": 5}], "message 0: its content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "message 0: parts"),
        ([{"role": "assistant", "tool_calls": [{"x": 1}]}], "message 0: a tool call"),
    ],
)
def test_messages_that_are_none(demo: Model, messages: Any, says: str) -> None:
    for template in (None, "chatml"):
        with pytest.raises(superllama.TemplateError, match=says):
            demo.apply_chat_template(messages, template=template)


def test_templates_that_fail_say_why(demo: Model) -> None:
    with pytest.raises(superllama.TemplateError, match="cannot be parsed"):
        demo.apply_chat_template([USER], template="{% for %}")
    with pytest.raises(superllama.TemplateError, match="mine"):
        demo.apply_chat_template([USER], template="{{ raise_exception('mine') }}")
    with pytest.raises(superllama.TemplateError, match="knows no chat template"):
        demo.apply_chat_template([USER], template="no such name")


@pytest.mark.parametrize(
    "source",
    [
        "{{ range(1000000000) | list | length }}",
        "{{ " + "(" * 30000 + "1" + ")" * 30000 + " }}",
        "{{ " + "[" * 30000 + "1" + "]" * 30000 + " }}",
        "{% if true %}" * 30000 + "{% endif %}" * 30000,
        "{% set x %}" * 30000 + "{% endset %}" * 30000,
        "{% if true %}{% set x %}{% endset %}" * 30000 + "{% endif %}" * 30000,
        "{% if false %}" + "{% elif false %}" * 30000 + "{% endif %}",
        "{{ " + "not " * 30000 + "true }}",
        "{{ " + "- " * 30000 + "1 }}",
        "{{ 1" + "+ 1" * 30000 + " }}",
        "{{ 'a'" + "| upper" * 30000 + " }}",
        "{{ a" + ".b" * 30000 + " }}",
        "{{ " + "1 if true else " * 30000 + "2 }}",
        "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(x) %}{{ g(x) }}{% endmacro %}{% macro g(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    ],
    ids=lambda source: source[:24],
)
def test_a_template_cannot_end_the_process(demo: Model, source: str) -> None:
    """It comes with a file from anywhere, and is parsed, run and freed by recursion."""
    with pytest.raises(superllama.TemplateError):
        demo.apply_chat_template([USER], template=source)
    assert demo.apply_chat_template([USER])


def test_a_template_cannot_reach_out_of_itself(demo: Model) -> None:
    assert demo.apply_chat_template([USER], template="{{ messages[0].content }}{{ ''.__class__.__mro__ }}") == "Hi"


@pytest.mark.slow
def test_a_template_that_does_not_end_is_stopped(demo: Model) -> None:
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{{ b }}{% endfor %}{% endfor %}"
    with pytest.raises(superllama.TemplateError, match="does not come to an end"):
        demo.apply_chat_template([USER], template=loops)


def test_a_macro_may_call_itself(demo: Model) -> None:
    source = (
        "{% macro down(n) %}{{ n }}{% if n > 0 %}{{ down(n - 1) }}{% endif %}{% endmacro %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}{{ down(30) }}"
    )
    assert demo.apply_chat_template([USER], template=source) == "Hi" + "".join(map(str, range(30, -1, -1)))


# ---------------------------------------------------------------- keep

GREEDY = {"temperature": 0, "max_tokens": 6}


def test_keep_does_not_double_the_conversation(demo: Model) -> None:
    with Context(demo, n_ctx=512) as ctx, Context(demo, n_ctx=512) as fresh:
        messages = [USER]
        for question in ("And you?", "Why?"):
            answer = "".join(p.text for p in ctx.chat(messages, keep=True, **GREEDY))
            assert answer == "".join(p.text for p in fresh.chat(messages, **GREEDY))
            assert ctx.seq_pos_max() == fresh.seq_pos_max()
            messages += [{"role": "assistant", "content": answer}, {"role": "user", "content": question}]
        *_, last = ctx.chat(messages, keep=True, **GREEDY)
        *_, whole = fresh.chat(messages, **GREEDY)
        assert last.summary is not None
        assert whole.summary is not None
        assert last.summary.prompt_tokens < whole.summary.prompt_tokens / 2  # the rest was there


def test_keep_with_another_conversation(demo: Model) -> None:
    with Context(demo, n_ctx=512) as ctx, Context(demo, n_ctx=512) as fresh:
        list(ctx.chat([USER], **GREEDY))
        other = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is water?"}]
        answer = [p.token for p in ctx.chat(other, keep=True, **GREEDY)]
        assert answer == [p.token for p in fresh.chat(other, **GREEDY)]
        ctx.seq_shift(0, 0)  # what was moved about is not known any more, and not kept
        assert answer == [p.token for p in ctx.chat(other, keep=True, **GREEDY)]
