"""Tools: a typed function as what a model may call, and the call that it makes."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, create_model

from .._errors import RequestError

Tool = Callable[..., Any] | Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """What a model wants to be called. `call()` does it, where the tool was given as a function."""

    id: str  # of the call, for its result
    name: str  # of the tool
    arguments: Mapping[str, Any]  # by name, as the model gave them
    function: Callable[..., Any] | None = dataclasses.field(
        default=None, repr=False, compare=False
    )  # the tool, where it was given as one

    def call(self) -> Any:
        """What the function returns for these arguments, converted to its types.

        Raises: RequestError if the tool was not given as a function, pydantic.ValidationError for arguments that do
        not fit it.
        """
        if self.function is None:
            raise RequestError(f"the tool {self.name} was given as a schema; call what stands for it yourself")
        model = parameters_model(self.function)
        checked = model.model_validate(dict(self.arguments))
        return self.function(**{name: getattr(checked, name) for name in type(checked).model_fields})

    def result(self, content: Any) -> dict[str, Any]:
        """The message that tells the model what came of it."""
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False, default=str)
        return {"role": "tool", "tool_call_id": self.id, "name": self.name, "content": text}


def parameters_model(function: Callable[..., Any]) -> type[BaseModel]:
    """The parameters of a function as a pydantic class. Raises: RequestError for what JSON cannot pass."""
    fields: dict[str, Any] = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise RequestError(f"the tool {function.__name__} takes {parameter}, which a call by names cannot give")
        annotation = Any if parameter.annotation is parameter.empty else parameter.annotation
        fields[name] = (annotation, ... if parameter.default is parameter.empty else parameter.default)
    return create_model(function.__name__, __config__=ConfigDict(extra="forbid"), **fields)


def tool_schemas(tools: Sequence[Tool]) -> tuple[list[dict[str, Any]], dict[str, Callable[..., Any]]]:
    """Tools as the API wants them, and the functions among them by name.

    Raises: RequestError for what is no tool, or has the name of another one.
    """
    schemas: list[dict[str, Any]] = []
    schema: dict[str, Any]
    functions: dict[str, Callable[..., Any]] = {}
    for tool in tools:
        if isinstance(tool, Mapping):
            schema = dict(tool) if "function" in tool else {"type": "function", "function": dict(tool)}
        elif callable(tool):
            parameters = parameters_model(tool).model_json_schema()
            parameters.pop("title", None)
            about = inspect.getdoc(tool) or ""
            name = str(getattr(tool, "__name__", type(tool).__name__))
            schema = {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}
            functions[name] = tool
        else:
            raise RequestError(f"a tool is a function or its schema, not {type(tool).__name__}")
        schemas.append(schema)
    names = [schema["function"].get("name") for schema in schemas]
    if twice := {name for name in names if names.count(name) > 1}:
        raise RequestError(f"two tools have the name {twice.pop()!r}")
    return schemas, functions


def tool_calls_of(calls: Sequence[Mapping[str, Any]], functions: Mapping[str, Callable[..., Any]]) -> list[ToolCall]:
    """The calls of an answer. Raises: RequestError where the arguments are no JSON."""
    found = []
    for call in calls:
        name, text = call["function"]["name"], call["function"].get("arguments") or "{}"
        try:
            arguments = json.loads(text)
        except ValueError as e:
            raise RequestError(f"the model calls {name} with arguments that are no JSON ({e}): {text:.200}") from e
        found.append(ToolCall(call.get("id", ""), name, arguments, functions.get(name)))
    return found
