"""The plugin of `llm`: models of this machine answer there, with conversations, schemas, tools and vectors."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import TOOLS

pytest.importorskip("llm.parts", reason="llm 0.32 or newer is not installed: pip install 'superllama[llm]'")

import llm
from click.testing import CliRunner
from llm.cli import cli
from llm.parts import ToolCallPart, ToolResultPart
from llm.plugins import load_plugins, pm

import superllama
from superllama import _llm_plugin

TINY = "lmstudio:org/tiny/m.gguf"
BERT = "lmstudio:org/bert/m.gguf"
QUICK: dict[str, Any] = {"n_ctx": 512, "n_threads": 1, "chat_template": "chatml", "max_tokens": 4, "temperature": 0}
DEMO: dict[str, Any] = {"n_ctx": 2048, "temperature": 0}


@pytest.fixture(autouse=True, scope="module")
def machine(tiny_model: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A machine with two models of LM Studio, and llm with a folder and a log of its own."""
    folder = tmp_path_factory.mktemp("llm")
    for name, model in (("tiny", tiny_model), ("bert", tiny_bert)):
        (folder / "models/org" / name).mkdir(parents=True)
        shutil.copy(model, folder / "models/org" / name / "m.gguf")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LLM_USER_PATH", str(folder))
        patch.setenv("LLM_LOAD_PLUGINS", "")  # those that the tests name, and no others of this machine
        patch.setenv("LMSTUDIO_MODELS", str(folder / "models"))
        for variable in ("OLLAMA_MODELS", "HF_HUB_CACHE", "LLAMA_CACHE"):
            patch.setenv(variable, str(folder / "none"))
        load_plugins()
        if not pm.is_registered(_llm_plugin):
            pm.register(_llm_plugin)
        yield
        for _, engine in _llm_plugin._engines.values():
            engine.close()


def command(*words: object, stdin: str = "") -> str:
    done = CliRunner().invoke(cli, list(map(str, words)), input=stdin)
    assert done.exit_code == 0, done.output
    return done.stdout


def options(given: dict[str, Any]) -> list[object]:
    return [word for name, value in given.items() for word in ("-o", name, value)]


def engine_of(name: str) -> superllama.LLM:
    (found,) = (e for (_, n), (_, e) in _llm_plugin._engines.items() if n == name and isinstance(e, superllama.LLM))
    return found


def test_models_have_the_names_of_superllama() -> None:
    names = {model.model_id for model in llm.get_models()}
    assert {"superllama-demo", TINY, BERT} <= names
    assert {model.model_id for model in llm.get_async_models()} >= {"superllama-demo", TINY}
    assert "mem_budget" in command("models", "list", "-m", TINY, "--options")


def test_an_answer_is_that_of_an_engine(tiny_model: Path) -> None:
    with superllama.LLM(tiny_model, n_ctx=512, n_threads=1, chat_template="chatml") as engine:
        expected = engine.chat("the", max_tokens=4, temperature=0).text
    model = llm.get_model(TINY)
    assert model.prompt("the", **QUICK).text() == model.prompt("the", stream=False, **QUICK).text() == expected
    assert command("-m", TINY, "the", "--no-log", *options(QUICK)) == expected + "\n"
    used = model.prompt("the", **QUICK).usage()
    assert used.output == 4 and used.input == engine_of(TINY).chat("the", max_tokens=1).usage.prompt_tokens


def test_an_engine_stays_until_its_options_change() -> None:
    model = llm.get_model(TINY)
    model.prompt("the", **QUICK).text()
    first = engine_of(TINY)
    llm.get_model(TINY).prompt("the", **QUICK | {"max_tokens": 2, "seed": 3}).text()
    assert engine_of(TINY) is first and not first.closed
    model.prompt("the", **QUICK | {"mem_budget": "64MiB"}).text()
    assert first.closed and engine_of(TINY).layers()


def test_a_conversation_goes_on(demo_model: Path) -> None:
    talk = llm.get_model("superllama-demo").conversation()
    first = talk.prompt("What is the capital of Italy? Answer with one word.", system="Be short.", **DEMO)
    assert "Rome" in first.text()
    second = talk.prompt("And of France?", max_tokens=20, **DEMO)
    second.text()
    assert [message.role for message in second.prompt.messages] == ["system", "user", "assistant", "user"]
    # what was computed is there; the token that ended the first answer is not, for nobody asked what follows it
    assert second.usage().details["cached_tokens"] >= first.usage().input


def test_the_command_chats(demo_model: Path) -> None:
    asked = "What is the capital of Italy? Answer with one word.\nexit\n"
    assert "Rome" in command("chat", "-m", "superllama-demo", *options(DEMO), stdin=asked)


def test_an_answer_has_the_form_of_a_schema(demo_model: Path) -> None:
    words = ["-m", "superllama-demo", "--schema", "name, age int", "Invent a dog", *options(DEMO | {"max_tokens": 100})]
    for more in ([], ["--no-stream"]):
        dog = json.loads(command(*words, *more))
        assert set(dog) == {"name", "age"} and isinstance(dog["age"], int)


def weather(city: str) -> str:
    """The weather in a city."""
    return f"snow in {city}"


def test_a_tool_is_called(demo_model: Path) -> None:
    """The small model sees first what a call looks like."""
    before: list[Any] = []
    for i, city in enumerate(("Oslo", "Rome", "Bern")):
        before += [
            llm.user(f"Weather in {city}?"),
            llm.assistant(ToolCallPart("weather", {"city": city}, f"c{i}")),
            llm.tool_message(ToolResultPart("weather", f"rain in {city}", f"c{i}")),
            llm.assistant("Rain."),
        ]
    with_tools = DEMO | {"max_tokens": 60, "chat_template_file": str(TOOLS)}
    chain = llm.get_model("superllama-demo").chain(
        "Weather in Lima?", messages=before, tools=[weather], options=with_tools
    )
    first, last = list(chain.responses())
    assert [(call.name, call.arguments) for call in first.tool_calls()] == [("weather", {"city": "Lima"})]
    assert last.prompt.messages[-1].parts[0].output == "snow in Lima"
    assert last.text() and not last.tool_calls()


def test_what_a_template_does_not_show_is_an_error() -> None:
    done = CliRunner().invoke(cli, ["-m", TINY, "the", "-T", "llm_version", *map(str, options(QUICK))])
    assert done.exit_code == 1 and "chat_template_file" in done.output


def test_a_wrong_option_is_an_error() -> None:
    done = CliRunner().invoke(cli, ["-m", TINY, "the", "-o", "mem_budgt", "1GiB"])
    assert done.exit_code == 1 and "mem_budgt" in done.output
    with pytest.raises(superllama.ModelError, match="mem_budget: 1 MiB are too few"):
        llm.get_model(TINY).prompt("the", **QUICK | {"mem_budget": "1MiB"}).text()


def test_asyncio() -> None:
    async def answers() -> list[str]:
        model = llm.get_async_model(TINY)
        return [await model.prompt("the", stream=stream, **QUICK).text() for stream in (True, False)]

    assert asyncio.run(answers()) == 2 * [llm.get_model(TINY).prompt("the", **QUICK).text()]


def test_vectors(tiny_bert: Path) -> None:
    assert [m.model_id for m in llm.get_embedding_models() if m.model_id.startswith("lmstudio:")] == [BERT]
    with superllama.LLM(tiny_bert, embedding=True) as engine:
        expected = engine.embed(["the", "a"])
    model = llm.get_embedding_model(BERT)
    assert list(model.embed_multi(["the", "a"])) == [pytest.approx(vector, abs=1e-5) for vector in expected]
    assert json.loads(command("embed", "-m", BERT, "-c", "the")) == pytest.approx(expected[0], abs=1e-5)
