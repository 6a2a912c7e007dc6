"""Conversations to prompts, by the Jinja template that the model file has: the prompt of llama-server, bit for bit.

The library's C API knows common templates by their text, and leaves out what makes one special, such as a system turn
that is there by default. So templates are run, as the server runs them, and messages are prepared as it prepares them:
what a template can read is found by trying it once.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ._errors import TemplateError

MARK = "M4RK"  # a text that no template has


def is_jinja(template: str) -> bool:
    """Whether this is a template, and not the name of one."""
    return "{{" in template or "{%" in template


@dataclasses.dataclass(frozen=True)
class Abilities:
    """What a template reads of a message."""

    text: bool  # content that is a text
    parts: bool  # content that is a list of parts
    system: bool
    object_arguments: bool  # of tool calls


class ChatTemplate:
    """A template with the vocabulary's texts for its `bos_token` and `eos_token`.

    Raises: TemplateError if it is not Jinja.
    """

    def __init__(self, source: str, bos_token: str, eos_token: str) -> None:
        import jinja2

        self.source = source
        self.tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as e:
            raise TemplateError(f"the chat template cannot be parsed: {e}; name another one, e.g. 'chatml'") from e

    def prompt(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The prompt for a conversation. A last message of the assistant is gone on with.

        Raises: TemplateError for messages that are none, or that the template refuses.
        """
        prepared = self._prepared(checked(messages))
        begun = ""
        if add_generation_prompt and prepared[-1]["role"] == "assistant" and not prepared[-1].get("tool_calls"):
            begun = joined(prepared.pop()["content"])
        try:
            text = self._render(prepared, add_generation_prompt)
        except Exception as e:  # a template may raise whatever it likes
            raise TemplateError(f"the model's chat template refuses this conversation: {e}") from e
        return text + begun

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        now = datetime.datetime.now()
        return str(
            self._template.render(
                messages=messages,
                **self.tokens,
                **({"add_generation_prompt": True} if add_generation_prompt else {}),
                enable_thinking=True,
                datetime=now.strftime("%b %d %Y"),
                date_string=now.strftime("%d %b %Y"),
            )
        )

    # ---------------------------------------------------------------- as the server prepares messages

    def _prepared(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        can = self.abilities
        for message in messages:
            content = message["content"]
            if can.text and not can.parts:
                message["content"] = joined(content)
            elif can.parts and not can.text and isinstance(content, str):
                message["content"] = [{"type": "text", "text": content}]
            if message["role"] == "developer" and "<|channel|>" not in self.source:
                message["role"] = "system"
            for call in message.get("tool_calls", ()):
                if can.object_arguments:
                    call["function"]["arguments"] = _parsed(call["function"]["arguments"])
        if messages[0]["role"] == "system" and not can.system:
            first = messages.pop(0)
            if not messages:
                raise TemplateError("this model's chat template knows no system messages, and there are no others")
            messages[0]["content"] = joined(first["content"]) + "\n" + joined(messages[0]["content"])
        return messages

    @functools.cached_property
    def abilities(self) -> Abilities:
        """Found by rendering messages with a text that is looked for in the result."""
        user = {"role": "user", "content": "U"}

        def shows(*messages: dict[str, Any]) -> bool:
            try:
                return MARK in self._render([*messages], True)
            except Exception:
                return False

        def in_parts(text: str) -> list[dict[str, str]]:
            return [{"type": "text", "text": text}]

        def shows_parts() -> bool:
            try:
                text = self._render([{"role": "user", "content": in_parts(MARK)}], True)
            except Exception:
                return False
            return MARK in text and "'text'" not in text and '"text"' not in text  # not the list as such

        def calls(arguments: object) -> tuple[dict[str, Any], ...]:
            call = {"id": "call00001", "type": "function", "function": {"name": "tool1", "arguments": arguments}}
            return (
                user,
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": "T", "tool_call_id": "call00001"},
                {"role": "assistant", "content": "A"},
                user,
            )

        return Abilities(
            text=shows({"role": "user", "content": MARK}),
            parts=shows_parts(),
            system=shows({"role": "system", "content": MARK}, user)
            or shows({"role": "system", "content": in_parts(MARK)}, {"role": "user", "content": in_parts("U")}),
            object_arguments=shows(*calls({"arg": MARK})),
        )


def checked(messages: object) -> list[dict[str, Any]]:
    """Messages in the form of OpenAI's API as dicts of our own: a content that is null is empty, arguments are text.

    Raises: TemplateError that names the message and what is wrong with it.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise TemplateError(
            f"messages are a list of them, [{{'role': 'user', 'content': ...}}], not {type(messages).__name__}; a text "
            "as it is goes to generate()"
        )
    if not messages:
        raise TemplateError("there are no messages; give at least one {'role': 'user', 'content': ...}")
    return [_message(i, message) for i, message in enumerate(messages)]


def _message(i: int, message: Any) -> dict[str, Any]:
    where = f"message {i}"
    role = message.get("role") if isinstance(message, Mapping) else None
    if not isinstance(role, str) or "\0" in role:
        raise TemplateError(f"{where} must have a 'role' that is text; it is {message!r:.200}")
    if "content" not in message and not message.get("tool_calls"):
        raise TemplateError(f"{where} must have a 'content' or 'tool_calls'; it has {sorted(map(str, message))}")
    found: dict[str, Any] = {"role": role, "content": _content(where, message.get("content"))}
    for key in ("reasoning_content", "name", "tool_call_id"):
        if value := message.get(key):
            if not isinstance(value, str):
                raise TemplateError(f"{where}: {key} must be text, not {value!r:.60}")
            found[key] = value
    if calls := message.get("tool_calls"):
        found["tool_calls"] = [_call(where, call) for call in calls]
    return found


def _content(where: str, content: Any) -> str | list[dict[str, str]]:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise TemplateError(f"{where}: its content must be text or a list of parts, not {content!r:.60}")
    parts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise TemplateError(f"{where}: parts must be {{'type': 'text', 'text': ...}}, not {part!r:.60}")
        parts.append({"type": "text", "text": part["text"]})
    return parts or ""


def _call(where: str, call: Any) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise TemplateError(f"{where}: a tool call has a 'function' with a 'name', not {call!r:.80}")
    arguments = function.get("arguments", "")
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    found: dict[str, Any] = {"type": "function", "function": {"name": function["name"], "arguments": text}}
    if call.get("id"):
        found["id"] = call["id"]
    return found


def joined(content: Any) -> str:
    """A content as one text."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except ValueError as e:
        raise TemplateError(f"the arguments of a tool call are no JSON: {e}") from e


@functools.cache
def _environment() -> Any:
    """Sandboxed: a template comes with a file from anywhere."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **kwargs: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **kwargs)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda text: datetime.datetime.now().strftime(text)
    return environment
