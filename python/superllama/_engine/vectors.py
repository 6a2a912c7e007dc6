"""Requests for vectors of texts, and for the order of documents by their relevance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .._errors import PromptError, RequestError
from .._native import lib
from .calls import Call, are_several, checked_prompt
from .results import Ranked


def embed_call(inputs: Any, dimensions: int | None, normalize: bool) -> Call[Any]:
    """One vector for one text or list of tokens, a list of them for a list."""
    several = are_several(inputs)
    given = list(inputs) if several else [inputs]
    if several and not given:
        return Call("", None, lambda answer: [])
    if dimensions is not None and dimensions < 1:
        raise RequestError(f"dimensions must be 1 or more, not {dimensions}")
    # the first numbers of a vector have a length of their own
    whole = dimensions is None
    body = {
        "content": [checked_prompt(i, item) for i, item in enumerate(given)],
        "embd_normalize": 2 if normalize and whole else -1,
    }

    def read(answer: Any) -> Any:
        rows = sorted(answer, key=lambda row: row["index"])
        vectors = [row["embedding"][0] if len(row["embedding"]) == 1 else row["embedding"] for row in rows]
        if dimensions is not None:
            vectors = [_shortened(vector, dimensions, normalize) for vector in vectors]
        return vectors if several else vectors[0]

    return Call("/embeddings", body, read)


def _shortened(vector: list[float], dimensions: int, normalize: bool) -> list[float]:
    if dimensions > len(vector):
        raise RequestError(f"dimensions is {dimensions}, and the model's vectors have {len(vector)}")
    part = vector[:dimensions]
    length = sum(x * x for x in part) ** 0.5
    return [x / length for x in part] if normalize and length > 0 else part


def says_it_ranks(metadata: Mapping[str, str]) -> bool:
    """Whether a file says that its model was made for ranking; some old files of such models do not."""
    architecture = metadata.get("general.architecture", "")
    return (
        metadata.get(f"{architecture}.pooling_type") == str(lib.LLAMA_POOLING_TYPE_RANK)
        or f"{architecture}.classifier.output_labels" in metadata
        or "tokenizer.chat_template.rerank" in metadata
    )


def rerank_call(query: str, documents: Sequence[str], top_n: int | None) -> Call[list[Ranked]]:
    """Documents by their relevance, the best first."""
    given = list(documents)
    if isinstance(documents, str) or not all(isinstance(document, str) for document in given):
        raise PromptError("documents are a list of texts")
    if not given:
        return Call("", None, lambda answer: [])
    body = {"query": query, "documents": given} | ({} if top_n is None else {"top_n": top_n})

    def read(answer: Any) -> list[Ranked]:
        found = [Ranked(row["index"], row["relevance_score"], given[row["index"]]) for row in answer["results"]]
        return sorted(found, key=lambda row: -row.score)

    return Call("/v1/rerank", body, read)
