"""GET /metrics: what Prometheus' own parser reads of it, by its conventions, and that the numbers are those of the
status."""

from __future__ import annotations

import re
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from serving import HttpServer, http_server, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="dynamic layers need Linux")

UNITS = ("_bytes", "_seconds")


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    flags = ["-c", 512, "--mem-budget", "200MiB", "--metrics", "--paged-kv", "-np", 1]
    with http_server(demo_model, tmp_path_factory.mktemp("log") / "log", *flags) as found:
        yield found


def scraped(server: HttpServer, **headers: str) -> dict[str, Metric]:
    asked = urllib.request.Request(f"http://127.0.0.1:{server.port}/metrics", headers=headers)
    with urllib.request.urlopen(asked, timeout=60) as answer:
        text = answer.read().decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def ours(families: dict[str, Metric]) -> dict[str, Metric]:
    return {name.removeprefix("superllama:"): f for name, f in families.items() if name.startswith("superllama:")}


def test_the_parser_reads_it_and_names_follow_the_conventions(server: HttpServer) -> None:
    server.complete("the", n_predict=4)
    families = scraped(server)
    assert any(name.startswith("llamacpp:") for name in families)  # upstream's are there too
    found = ours(families)
    assert len(found) >= 30
    for name, family in found.items():
        assert family.documentation, name
        assert family.samples, name
        assert re.fullmatch(r"[a-z][a-z0-9_]*", name), name
        assert (family.type == "counter") == all(s.name.endswith("_total") for s in family.samples), name
        assert family.type in ("counter", "gauge"), name
        if any(word in name for word in ("byte", "second")):
            assert name.endswith(UNITS), name
        labels = [tuple(sorted(s.labels.items())) for s in family.samples]
        assert len(labels) == len(set(labels)), name


def test_pages_of_other_sites_read_what_llama_cpp_lets_them_read(server: HttpServer) -> None:
    families = scraped(server, **{"Sec-Fetch-Site": "cross-site"})
    assert families and not ours(families)
    assert ours(scraped(server, **{"Sec-Fetch-Site": "same-origin"}))


def test_the_numbers_are_those_of_the_status(server: HttpServer) -> None:
    def bytes_are_told() -> bool:  # after some ubatch: looking them up has a thousandth of the time
        server.complete("the " * 100, n_predict=4)
        return any(held["kv_bytes"] for held in server.request("/superllama")[1]["metrics"]["sequences"])

    until(bytes_are_told)
    found = ours(scraped(server))
    status = server.request("/superllama")[1]
    metrics = status["metrics"]

    def value(name: str, **labels: str) -> float:
        return next(s.value for s in found[name].samples if labels.items() <= s.labels.items())

    assert value("memory_budget_bytes") == metrics["mem_budget_bytes"]
    assert sum(s.value for s in found["memory_used_bytes"].samples) == status["memory_used_bytes"]
    assert {s.labels["tag"] for s in found["memory_used_bytes"].samples} == set(metrics["memory_by_tag"])
    assert value("tokens", kind="generated") == metrics["generated_tokens"]
    assert value("stall_seconds") == pytest.approx(metrics["stall_ms"] / 1e3, rel=1e-3)
    assert sum(s.value for s in found["layers"].samples) == len(status["layers"])
    sequences = metrics["sequences"]
    for kind in ("prompt", "generated"):
        assert sum(s[f"{kind}_tokens"] for s in sequences) == metrics[f"{kind}_tokens"] > 0
    for held in sequences:
        sequence = str(held["sequence"])
        assert value("sequence_tokens", sequence=sequence, kind="prompt") == held["prompt_tokens"]
        assert value("sequence_tokens", sequence=sequence, kind="generated") == held["generated_tokens"]
        assert value("sequence_kv_tokens", sequence=sequence) == held["kv_tokens"]
        assert value("sequence_kv_bytes", sequence=sequence) == held["kv_bytes"]
        for tier, name in (("host", "kv_pages_cpu"), ("disk", "kv_pages_disk")):
            assert value("sequence_kv_pages", sequence=sequence, tier=tier) == held[name]
    held_tokens = sum(held["kv_tokens"] for held in sequences)
    assert 0 < value("kv_usage_ratio") == pytest.approx(min(1, held_tokens / status["n_ctx"]))
    told = [s.labels["sequence"] for s in found["sequence_kv_tokens"].samples]
    assert told == [str(held["sequence"]) for held in sequences]
    (slot,) = (s for s in sequences if s["generated_tokens"])
    assert slot["kv_tokens"] >= slot["generated_tokens"] and slot["kv_bytes"] > 0 < slot["kv_pages_cpu"]
    assert value("build_info") == 1 and found["build_info"].samples[0].labels["version"] == status["version"]
    assert [s.labels["state"] for s in found["state"].samples if s.value] == ["ready"]


def test_while_the_memory_is_given_back(server: HttpServer) -> None:
    before = ours(scraped(server))
    server.request("/superllama/pause", {})
    assert server.request("/completion", {"prompt": "a"})[0] == 503
    found = ours(scraped(server))
    assert [s.labels["state"] for s in found["state"].samples if s.value] == ["paused"]
    assert found["requests_refused"].samples[0].value == before["requests_refused"].samples[0].value + 1
    assert "memory_used_bytes" not in found
    server.request("/superllama/resume", {})
    assert "memory_used_bytes" in ours(scraped(server))
