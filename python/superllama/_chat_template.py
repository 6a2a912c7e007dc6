"""Conversations to prompts, by the Jinja template that the model file has: the prompt of llama-server, bit for bit.

Templates are run by the server's own code, which prepares messages as well: some templates take parts, some texts, some
know no system turn.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from ._engine.library import address, last_error, library
from ._errors import TemplateError


def is_jinja(template: str) -> bool:
    """Whether this is a template, and not the name of one."""
    return "{{" in template or "{%" in template


class ChatTemplate:
    """A template with the vocabulary of a model, which has to stay while it is used; None: the model's own template.

    Raises: TemplateError if it cannot be parsed.
    """

    def __init__(self, c_model: Any, source: str | None) -> None:
        text = None if source is None else source.encode("utf-8", "surrogatepass")
        if text is not None and b"\0" in text:
            raise TemplateError("the chat template contains a NUL character")
        self._c = library().superllama_chat_template_make(address(c_model), text)
        if not self._c:
            raise TemplateError(
                f"the chat template cannot be used: {last_error().strip()}; name another one, e.g. 'chatml'"
            )
        weakref.finalize(self, library().superllama_chat_template_free, self._c)

    def prompt(self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool) -> str:
        """The prompt for a conversation. A last message of the assistant is gone on with.

        Raises: TemplateError for messages that are none, or that the template refuses.
        """
        body = json.dumps({"messages": checked(messages), "add_generation_prompt": add_generation_prompt}).encode()
        found = library().superllama_chat_template_apply(self._c, body, len(body))
        if found is None:
            raise TemplateError(f"the model's chat template refuses this conversation: {last_error().strip()}")
        return bytes(found).decode("utf-8", "replace")


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
