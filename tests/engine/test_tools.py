"""Functions as tools, without a model."""

from __future__ import annotations

from typing import Any, Literal

import pydantic
import pytest

import superllama
from superllama._engine.tools import tool_calls_of, tool_schemas


def weather(city: str, unit: Literal["C", "F"] = "C", days: int = 1) -> str:
    """The weather in a city."""
    return f"{city}: {days * 10} {unit}"


def test_a_function_is_a_schema() -> None:
    (schema,), functions = tool_schemas([weather])
    assert functions == {"weather": weather}
    function = schema["function"]
    assert function["name"] == "weather" and function["description"] == "The weather in a city."
    parameters = function["parameters"]
    assert parameters["required"] == ["city"]
    assert parameters["properties"]["unit"]["enum"] == ["C", "F"]
    assert parameters["properties"]["days"] == {"default": 1, "title": "Days", "type": "integer"}


def test_a_schema_stays_as_it_is() -> None:
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    whole = {"type": "function", "function": function}
    assert tool_schemas([function])[0] == tool_schemas([whole])[0] == [whole]


def test_a_call_is_made() -> None:
    call = {"id": "1", "function": {"name": "weather", "arguments": '{"city": "Lima", "days": "2"}'}}
    (found,) = tool_calls_of([call], {"weather": weather})
    assert found.arguments == {"city": "Lima", "days": "2"}
    assert found.call() == "Lima: 20 C"  # converted to the function's types
    assert found.result({"t": 20}) == {"role": "tool", "tool_call_id": "1", "name": "weather", "content": '{"t": 20}'}


def test_what_does_not_fit_is_an_error() -> None:
    (wrong,) = tool_calls_of([{"function": {"name": "weather", "arguments": '{"town": "Lima"}'}}], {"weather": weather})
    with pytest.raises(pydantic.ValidationError, match="town"):
        wrong.call()
    (unknown,) = tool_calls_of([{"function": {"name": "g", "arguments": ""}}], {})
    assert unknown.arguments == {}
    with pytest.raises(superllama.RequestError, match="schema"):
        unknown.call()
    with pytest.raises(superllama.RequestError, match="no JSON"):
        tool_calls_of([{"function": {"name": "weather", "arguments": "{"}}], {})


def star(*args: int) -> None: ...


@pytest.mark.parametrize(
    ("tools", "why"), [([3], "function or its schema"), ([star], "by names"), ([weather, weather], "two tools")]
)
def test_what_is_no_tool_is_refused(tools: Any, why: str) -> None:
    with pytest.raises(superllama.RequestError, match=why):
        tool_schemas(tools)
