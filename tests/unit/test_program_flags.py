"""What --help of a program says of its flags."""

from __future__ import annotations

import pytest

from superllama._commands.program_flags import Flag, flags_of, parsed
from superllama._engine.library import flags

TEXT = """usage: x [options]

options:
  -h, --help
  -o, --output <csv|json>   output format (default: csv)
  -ot --override-tensor <pattern>=<buffer type>;...
                            (default: none)

----- common params -----

-t,    --threads N                      number of threads
                                        (env: LLAMA_ARG_THREADS)
-kvo,  --kv-offload, -nkvo, --no-kv-offload
                                        whether to offload
--range START END                       layers
--mode MODE                             how (default: auto)
                                        - auto: somehow
                                        - mmap+x: in a way
--type TYPE                             what
                                        allowed values: f32, q8_0
--spec-type none,a-b,c-d,e-f            which
-m,    --model FNAME                    model path

Some words that are no flag.
    - nor is this: one
"""


def test_the_parts_of_a_flag() -> None:
    found = {flag.names: flag for flag in parsed(TEXT)}
    assert found[("-h", "--help")] == Flag(("-h", "--help"), "", "")
    assert found[("-t", "--threads")] == Flag(("-t", "--threads"), "N", "number of threads", ("LLAMA_ARG_THREADS",))
    assert found[("-ot", "--override-tensor")].value == "<pattern>=<buffer type>;..."
    assert found[("-kvo", "--kv-offload", "-nkvo", "--no-kv-offload")].about == "whether to offload"
    assert found[("-m", "--model")].about == "model path"
    assert len(found) == 10


def test_what_a_value_may_be() -> None:
    found = {flag.names[-1]: flag for flag in parsed(TEXT)}
    assert found["--output"].choices == ["csv", "json"]
    assert found["--mode"].choices == ["auto", "mmap+x"]
    assert found["--type"].choices == ["f32", "q8_0"]
    assert found["--spec-type"].choices == ["none", "a-b", "c-d", "e-f"]
    assert found["--threads"].choices == found["--no-kv-offload"].choices == []
    assert [flag.names[-1] for flag in parsed(TEXT) if flag.names_file] == ["--model"]
    assert {name: flag.n_values for name, flag in found.items() if flag.n_values != 1} == {
        "--help": 0,
        "--no-kv-offload": 0,
        "--range": 2,
    }


def test_they_are_those_that_the_library_parses() -> None:
    """What prints something and ends, and what only a server of several models has, is no flag of an engine."""
    known = {name: flag for flag in flags_of("llama-server") for name in flag.names}
    assert flags().items() <= {name: bool(flag.value) for name, flag in known.items()}.items()
    assert "LLAMA_ARG_MEM_BUDGET" in known["--mem-budget"].variables


@pytest.mark.parametrize(
    ("program", "names"),
    [
        ("llama-cli", {"-p", "--single-turn", "--mem-budget"}),
        ("llama-completion", {"-no-cnv", "--async-prefetch"}),
        ("llama-bench", {"-pg", "--repetitions", "--vram-budget"}),
        ("llama-perplexity", {"--ppl-stride", "-c"}),
        ("llama-quantize", {"--imatrix", "--dry-run"}),
        ("ggml-rpc-server", {"-H", "--port"}),
    ],
)
def test_every_program_shows_its_flags(program: str, names: set[str]) -> None:
    assert names <= {name for flag in flags_of(program) for name in flag.names}
