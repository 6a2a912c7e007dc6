"""LangChain, LlamaIndex and Outlines, as published, on superllama: they import llama_cpp, which is compat here."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest

from superllama import compat

PROMPT = "The capital of France is"
WHY = "not installed: pip install 'superllama[integrations]'"
WHY_INDEX = "not installed: pip install --no-deps llama-index-llms-llama-cpp, which would compile llama-cpp-python else"


@pytest.fixture(autouse=True, scope="module")
def llama_cpp() -> Iterator[None]:
    """The module that they import."""
    before = sys.modules.pop("llama_cpp", None), sys.modules.pop("llama_cpp.llama_chat_format", None)
    compat.install()
    yield
    for name, module in zip(("llama_cpp", "llama_cpp.llama_chat_format"), before, strict=True):
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


@pytest.fixture(scope="module")
def llama(demo_model: Path) -> Iterator[compat.Llama]:
    with compat.Llama(str(demo_model), n_ctx=512, n_threads=2) as made:
        yield made


@pytest.fixture(scope="module")
def said(llama: compat.Llama) -> str:
    """What the model says itself."""
    return str(llama(PROMPT, max_tokens=6, temperature=0)["choices"][0]["text"])


class City(pydantic.BaseModel):
    """A city."""

    name: str = pydantic.Field(max_length=20)
    is_large: bool  # of a number, a model without a seed may write digits without end


# ---------------------------------------------------------------- LangChain


def test_langchain_completes(demo_model: Path, said: str) -> None:
    llms = pytest.importorskip("langchain_community.llms", reason=f"langchain-community is {WHY}")
    options = {"n_ctx": 512, "n_batch": 512, "n_threads": 2, "temperature": 0.0, "max_tokens": 6, "verbose": False}
    options |= {"rope_freq_base": 0.0, "rope_freq_scale": 0.0, "repeat_penalty": 1.0}  # as the model and Llama have it
    llm = llms.LlamaCpp(model_path=str(demo_model), model_kwargs={"mem_budget": "60%"}, **options)
    assert llm.invoke(PROMPT) == said
    assert "".join(llm.stream(PROMPT)) == said
    assert llm.batch([PROMPT, PROMPT]) == [said, said]
    assert llm.invoke(PROMPT, stop=[said[-2:]]) == said[: said.index(said[-2:])]
    assert llm.get_num_tokens(PROMPT) == len(llm.client.tokenize(PROMPT.encode()))
    llm.client.close()
    held = llms.LlamaCpp(model_path=str(demo_model), grammar='root ::= "x" "y"', **options)
    assert held.invoke(PROMPT) == "xy"
    held.client.close()


def test_langchain_chats(demo_model: Path) -> None:
    chat_models = pytest.importorskip("langchain_community.chat_models", reason=f"langchain-community is {WHY}")
    options = {"n_ctx": 512, "n_batch": 512, "temperature": 0.0, "max_tokens": 16, "verbose": False}
    chat = chat_models.ChatLlamaCpp(
        model_path=str(demo_model), rope_freq_base=0.0, model_kwargs={"n_threads": 2}, **options
    )
    messages = [("system", "You are brief."), ("human", "What is a llama?")]
    answer = chat.invoke(messages)
    assert answer.content
    assert "".join(str(chunk.content) for chunk in chat.stream(messages)) == answer.content
    chat.client.close()


def test_langchain_embeds(tiny_bert: Path) -> None:
    embeddings = pytest.importorskip("langchain_community.embeddings", reason=f"langchain-community is {WHY}")
    found = embeddings.LlamaCppEmbeddings(model_path=str(tiny_bert), n_ctx=0, n_batch=512, verbose=False)
    one, two = found.embed_documents(["the", "llama"])
    assert found.embed_query("the") == pytest.approx(one) and len(two) == found.client.n_embd()
    found.client.close()


# ---------------------------------------------------------------- LlamaIndex


def test_llama_index(demo_model: Path, said: str) -> None:
    package = pytest.importorskip("llama_index.llms.llama_cpp", reason=WHY_INDEX)
    from llama_index.core.llms import ChatMessage  # type: ignore[import-not-found,unused-ignore]

    llm = package.LlamaCPP(
        model_path=str(demo_model), temperature=0.0, max_new_tokens=6, context_window=512, verbose=False,
        model_kwargs={"mem_budget": "60%", "n_threads": 2}, completion_to_prompt=str,
        messages_to_prompt=lambda messages: str(messages[-1].content),
    )  # fmt: skip
    assert llm.metadata.context_window == 512
    assert llm.complete(PROMPT).text == said
    assert [part.text for part in llm.stream_complete(PROMPT)][-1] == said
    assert llm.chat([ChatMessage(role="user", content=PROMPT)]).message.content == said
    llm._model.close()


# ---------------------------------------------------------------- Outlines


def test_outlines(llama: compat.Llama, said: str) -> None:
    outlines: Any = pytest.importorskip("outlines", reason=f"outlines is {WHY}")
    pytest.importorskip("numba", reason=f"numba, which outlines needs for this, is {WHY}")
    model = outlines.from_llamacpp(llama, chat_mode=False)
    assert model(PROMPT, max_tokens=6, temperature=0.0) == said
    assert model("A word:", Literal["yes", "no"], max_tokens=8) in ("yes", "no")
    number = model("A number:", outlines.types.regex("[1-9][0-9]{2}"), max_tokens=8)
    assert re.fullmatch("[1-9][0-9]{2}", number)
    parts = "".join(model.stream("A number:", outlines.types.regex("[1-9][0-9]{2}"), max_tokens=8))
    assert re.fullmatch("[1-9][0-9]{2}", parts)
    City.model_validate_json(model("A city as JSON:", City, max_tokens=200))
    said_in_chat = outlines.from_llamacpp(llama)("Is a llama an animal?", Literal["yes", "no"], max_tokens=8)
    assert said_in_chat in ("yes", "no")
