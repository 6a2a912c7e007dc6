"""Messages in the words of the caller: parameters in Python, flags on the command line."""

from __future__ import annotations

import re

import pytest

import superllama
from superllama import ContextParams, ModelParams
from superllama._native import collected_errors, ffi, lib, log
from superllama._words import as_flags, in_python


@pytest.mark.parametrize(
    ("library", "python"),
    [
        ("--mem-budget: 5 MiB are too few", "mem_budget: 5 MiB are too few"),
        ("raise --mem-budget, or lower --ubatch-size", "raise mem_budget, or lower n_ubatch"),
        ("--kv-budget 1 GiB; --ctx-size or --no-repack", "kv_budget 1 GiB; n_ctx or use_extra_bufts=False"),
        ("--override-tensor x=CPU, --gpu-layers", "override_tensor x=CPU, n_gpu_layers"),
        ("-nkvo keeps it, (-ub 5)", "offload_kqv=False keeps it, (n_ubatch 5)"),
        ("try --override-kv a.b=bool:false", "try override_kv={'a.b': False}"),
        ("x-ub -ubx -1 file-ngl.gguf - -", "x-ub -ubx -1 file-ngl.gguf - -"),
        ("a -- b, 3--4, x--flag, a--", "a -- b, 3--4, x--flag, a--"),
    ],
)
def test_flags_become_parameters(library: str, python: str) -> None:
    assert in_python(library) == python


def test_the_command_has_its_flags_back() -> None:
    assert as_flags("raise mem_budget, or lower n_ctx=4096") == "raise --mem-budget, or lower -c 4096"


def test_every_flag_of_ours_has_a_name_in_python() -> None:
    """The names that the library's own messages can use are fields, or said in another way on purpose."""
    fields = {*ModelParams.model_fields, *ContextParams.model_fields}
    for flag in ("mem-budget", "vram-budget", "kv-budget", "spill-dir", "kv-page-size", "dynamic-layers", "paged-kv"):
        assert in_python(f"--{flag}") in fields
    for flag in ("mem-pressure-low", "layer-policy", "metrics-file", "metrics-interval", "ubatch-size", "load-mode"):
        assert in_python(f"--{flag}") in fields


def test_the_log_and_its_errors_too(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("ERROR", logger=log.name), collected_errors() as errors:
        lib.superllama_py_log(lib.GGML_LOG_LEVEL_ERROR, b"x: --spill-dir /y cannot be written\n", ffi.NULL)
        assert list(errors) == ["x: spill_dir /y cannot be written"]
    assert caplog.messages == ["x: spill_dir /y cannot be written"]


def test_no_error_of_a_budget_names_a_flag(tiny_model: object) -> None:
    for use in (
        lambda: superllama.Model(tiny_model, mem_budget=4096),  # type: ignore[arg-type]
        lambda: superllama.Context(tiny_model, kv_budget=1000),  # type: ignore[arg-type]
        lambda: superllama.Context(tiny_model, metrics_file="/nowhere/at/all"),  # type: ignore[arg-type]
    ):
        with pytest.raises(superllama.Error) as e:
            use()
        assert not re.search(r"(^|\s)--?[a-z]", str(e.value)), e.value
