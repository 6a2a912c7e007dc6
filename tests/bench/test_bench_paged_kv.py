"""paged_kv.py as a whole, on a tiny model."""

import json

import pytest
from bench import paged_kv

TINY = ["--conversations", "4", "--tokens", "200", "--resident", "2", "--page-size", "16", "--memory-context", "2048"]
TINY += ["--memory-tokens", "512", "--turns", "2", "--turn-prompt", "16", "--turn-tokens", "4"]


@pytest.mark.slow
def test_all_runs(native, tiny_model, tmp_path, capsys):
    command = [str(tiny_model), *TINY, "--out", str(tmp_path), "--runs", "memory-*", "resume-*", "decode"]
    assert paged_kv.main([*command, "oversized-stock", "oversized-75"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("###") == 4
    assert "DIFFERENT" not in printed
    assert (tmp_path / "plot.png").stat().st_size > 0
    paged = json.loads((tmp_path / "resume-paged.json").read_text())
    assert paged["restored"] > 0
    assert paged["answers"] == json.loads((tmp_path / "resume-in-memory.json").read_text())["answers"]

    (tmp_path / "resume-paged.json").write_text(json.dumps(paged | {"answers": []}))
    assert paged_kv.main(command) == 0  # runs nothing again, and shows what is there
    assert "DIFFERENT" in capsys.readouterr().out


def test_what_cannot_work(native, tiny_model, tmp_path, capsys):
    out = ["--out", str(tmp_path)]
    assert paged_kv.main([str(tmp_path / "none.gguf"), *out]) == 1
    assert "does not exist" in capsys.readouterr().err
    assert paged_kv.main([str(tiny_model), *out, "--runs", "nothing"]) == 1
    assert "memory-stock" in capsys.readouterr().err
    assert paged_kv.main([str(tiny_model), *out, "--runs", "oversized-25", "--tokens", "64"]) == 1
    assert "needs at least" in capsys.readouterr().err
