"""Models that other programs keep: found by name, used where they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from running import Runner

import superllama
from superllama import cli
from superllama._models import by_name, found_models

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="folders of POSIX")


@pytest.fixture
def machine(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a model of each kind, and some of what lies beside."""
    for variable in ("OLLAMA_MODELS", "LMSTUDIO_MODELS", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    data = tiny_model.read_bytes()

    ollama = tmp_path / ".ollama/models"
    for namespace, name, tag, digest in (
        ("library", "tiny", "latest", "sha256:aa"),
        ("library", "tiny", "3b", "sha256:aa"),
        ("some", "other", "q4", "sha256:aa"),
        ("library", "gone", "latest", "sha256:bb"),
    ):
        manifest = ollama / "manifests/registry.ollama.ai" / namespace / name / tag
        manifest.parent.mkdir(parents=True, exist_ok=True)
        kind = "application/vnd.ollama.image."
        layers = [{"mediaType": kind + "license", "digest": "x"}, {"mediaType": kind + "model", "digest": digest}]
        manifest.write_text(json.dumps({"layers": layers}))
    (ollama / "manifests/registry.ollama.ai/library/odd").mkdir()
    (ollama / "manifests/registry.ollama.ai/library/odd/latest").write_text("no JSON")
    (ollama / "blobs").mkdir()
    (ollama / "blobs/sha256-aa").write_bytes(data)

    lmstudio = tmp_path / ".lmstudio/models/org/repo"
    lmstudio.mkdir(parents=True)
    for name in ("m-Q4_K_M.gguf", "mmproj-f16.gguf", "big-00001-of-00002.gguf", "big-00002-of-00002.gguf"):
        (lmstudio / name).write_bytes(data)

    snapshot = tmp_path / ".cache/huggingface/hub/models--org--repo-GGUF/snapshots/0123abcd"
    (snapshot / "sub").mkdir(parents=True)
    (snapshot / "sub/m.gguf").write_bytes(data)
    (snapshot / "broken.gguf").symlink_to(tmp_path / "nowhere")
    return tmp_path


def test_what_is_there_is_found(machine: Path, tiny_model: Path) -> None:
    size = tiny_model.stat().st_size
    assert {(found.name, found.bytes) for found in found_models()} == {
        ("huggingface:org/repo-GGUF/sub/m.gguf", size),
        ("lmstudio:org/repo/big-00001-of-00002.gguf", 2 * size),
        ("lmstudio:org/repo/m-Q4_K_M.gguf", size),
        ("ollama:some/other:q4", size),
        ("ollama:tiny:3b", size),
        ("ollama:tiny:latest", size),
    }


def test_a_name_is_a_path(machine: Path) -> None:
    for found in found_models():
        assert by_name(found.name) == str(found.path)
    assert by_name("ollama:tiny") == str(machine / ".ollama/models/blobs/sha256-aa")
    assert by_name(Path("ollama:tiny")) == by_name("ollama:tiny")
    snapshot = machine / ".cache/huggingface/hub/models--org--repo-GGUF/snapshots/0123abcd"
    assert by_name("hf:org/repo-GGUF") == str(snapshot / "sub/m.gguf")
    for other in ("model.gguf", "C:model.gguf", machine):
        assert by_name(other) == other  # type: ignore[comparison-overlap]
    for name in ("hf:a/b", "hf:org/repo-GGUF:Q8_0", "hf:nonsense"):
        with pytest.raises(superllama.ModelError, match=f"`superllama pull {name}` fetches it"):
            by_name(name)
    with pytest.raises(superllama.ModelError, match=r"ollama:nothing .* ollama:some/other:q4, ollama:tiny:3b"):
        by_name("ollama:nothing")


def test_models_load_by_name(machine: Path) -> None:
    with superllama.Model("ollama:tiny") as model:
        assert model.path == machine / ".ollama/models/blobs/sha256-aa"
    with superllama.LLM("lmstudio:org/repo/m-Q4_K_M.gguf", n_threads=1, n_ctx=64) as llm:
        assert llm.generate("the", max_tokens=1).usage.generated_tokens == 1
    with pytest.raises(superllama.ModelError, match=r"there are huggingface:org/repo-GGUF"):
        superllama.LLM("huggingface:org/nothing/m.gguf")


def test_a_plan_takes_names(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert superllama.plan("ollama:tiny", n_ctx=64).model == machine / ".ollama/models/blobs/sha256-aa"
    for words in (["ollama:tiny"], ["-m", "hf:org/repo-GGUF"]):
        assert cli.main(["plan", *words, "-c", "64", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["model"] == by_name(words[-1])
    assert cli.main(["plan", "ollama:nothing"]) == 1
    assert "there is no model ollama:nothing" in capsys.readouterr().err


def test_the_commands(machine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list"]) == 0
    assert "ollama:tiny:3b" in capsys.readouterr().out
    assert cli.main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"].startswith("huggingface:")


def test_a_machine_without_any(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for variable in ("OLLAMA_MODELS", "LMSTUDIO_MODELS", "HF_HUB_CACHE"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    assert found_models() == [] and cli.main(["list"]) == 0
    assert "no models" in capsys.readouterr().err
    with pytest.raises(superllama.ModelError, match="none of that kind"):
        by_name("ollama:x")


def test_programs_take_names(machine: Path, run_python: Runner) -> None:
    script = """
import sys
from superllama import _programs
_programs.run = lambda name, arguments: print(arguments)
sys.argv = ["superllama-cli", *sys.argv[1:]]
_programs.cli()
"""
    assert "sha256-aa" in run_python(script, "-m", "ollama:tiny").stdout
    assert "sha256-aa" in run_python(script, "-hf", "a/b", "-md", "ollama:tiny").stdout
    assert run_python(script, "--model", "hf:a/b:Q8_0").stdout == "['-hf', 'a/b:Q8_0']\n"
    done = run_python(script, "-m", "ollama:nothing")
    assert done.returncode == 1 and "there is no model ollama:nothing" in done.stderr
