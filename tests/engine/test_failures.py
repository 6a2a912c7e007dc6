"""What the server says went wrong, as errors that say what to write in Python."""

from __future__ import annotations

import pytest

import superllama
from superllama._engine.failures import failure


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (
            {
                **{"type": "exceed_context_size_error", "n_prompt_tokens": 900, "n_ctx": 512},
                "message": "request (900 tokens) exceeds the available context size (512 tokens), try increasing it",
            },
            superllama.PromptTooLongError,
            "the prompt has 900 tokens, but the context has 512; shorten it, or make the engine with n_ctx=901 or more",
        ),
        (
            {
                "type": "server_error",
                "message": "input (701 tokens) is too large to process. increase the physical batch size (current "
                "batch size: 512)",
            },
            superllama.PromptTooLongError,
            "the text has 701 tokens, which are computed at once, and n_ubatch is 512; shorten it, or make the engine "
            "with n_ubatch=701 and n_batch=701 or more",
        ),
        (
            {
                "type": "not_supported_error",
                "message": "This server does not support embeddings. Start it with `--embeddings`",
            },
            superllama.ModelError,
            "this engine was made without embeddings; make it with LLM(..., embedding=True)",
        ),
        (
            {
                "type": "not_supported_error",
                "message": "This server does not support reranking. Start it with `--reranking`",
            },
            superllama.ModelError,
            "this engine was made without reranking; make it with LLM(..., reranking=True)",
        ),
        (
            {
                "type": "invalid_request_error",
                "message": "Field 'json_schema': \"json_schema\": JSON schema conversion failed:\nJSON schema error at "
                "#/x: unrecognized type objct",
            },
            superllama.GrammarError,
            "JSON schema error at #/x: unrecognized type objct",
        ),
        (
            {"type": "invalid_request_error", "message": "Field 'repeat_last_n': too long"},
            superllama.RequestError,
            "penalty_last_n: too long",
        ),
        (
            {
                "type": "server_error",
                "message": "The model produced output that does not match the expected peg-native format",
            },
            superllama.GrammarError,
            "The model produced output that does not match the expected peg-native format; perhaps it was cut "
            "(max_tokens)",
        ),
    ],
)
def test_errors_in_the_words_of_python(error: dict[str, object], kind: type[Exception], said: str) -> None:
    found = failure(error)
    assert type(found) is kind and str(found) == said


def test_too_long_says_how_long_and_what_fits() -> None:
    found = failure({"type": "server_error", "message": "input (7 tokens) is too large to process (batch size: 5)"})
    assert isinstance(found, superllama.PromptTooLongError) and (found.n_tokens, found.n_room) == (7, 5)
