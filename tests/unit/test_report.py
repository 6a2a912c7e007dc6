"""`superllama report`: what a page says follows from the lines; files that are no good; a page that is safe to open."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import os
import re
import xml.etree.ElementTree as ET
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from parsed_html import Parsed

from superllama import Error, cli
from superllama._look import drawing as _drawing
from superllama._look.amounts import duration, memory, number, share, volume
from superllama._metrics import Metrics
from superllama._report.charts import charts
from superllama._report.file import MetricsFile, read_metrics
from superllama._report.findings import findings, spent
from superllama._report.page import MARK, report, write_report
from superllama._report.run import KEPT, Line, Run

MIB, GIB = 1 << 20, 1 << 30
BEGIN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


def line(at: float = 0, **fields: Any) -> dict[str, Any]:
    """A metrics line of a dense model under a budget of 4 GiB, `at` seconds after the first."""
    values: dict[str, Any] = dict.fromkeys(Metrics.model_fields, 0) | {
        "timestamp": (BEGIN + timedelta(seconds=at)).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "event": "periodic",
        "experts": None,
        "memory_by_tag": {"pinned": 3 * GIB, "ring": 64 * MIB, "kv": 200 * MIB},
        "sequences": [],
        "devices": [],
        "mem_budget_bytes": 4 * GIB,
        "cpu_layers_active": 20,
        "disk_layers_active": 10,
        "prefetch_completed": 1,
    }
    values |= fields
    values["token"] = values["prompt_tokens"] + values["generated_tokens"]
    return values


def generation(
    n: int = 10, seconds: float = 1.0, tokens: int = 2, first: dict[str, Any] | None = None, **each: float
) -> list[dict[str, Any]]:
    """Lines every `seconds`, in which so many tokens were generated; `each`: what a token adds to a counter."""
    first = {"prompt_tokens": 8, "generated_tokens": 1, **(first or {})}
    found = []
    for i in range(n + 1):
        counted = {name: first.get(name, 0) + i * tokens * value for name, value in each.items()}
        done = {"generated_tokens": first["generated_tokens"] + i * tokens, "tokens_per_sec": tokens / seconds}
        found.append(line(i * seconds, **{**first, **done, **counted}))
    return found


def written(path: Path, *lines: dict[str, Any] | str) -> Path:
    path.write_text("".join((text if isinstance(text, str) else json.dumps(text)) + "\n" for text in lines))
    return path


def run_of(lines: list[dict[str, Any]]) -> Run:
    first, *rest = (Line.model_validate(values) for values in lines)
    run = Run(first)
    for one in rest:
        run.add(one)
    return run


def test_the_map_of_experts_is_that_of_the_last_line_that_has_one(tmp_path: Path) -> None:
    told = {"layers": [0, 1], "uses": [[5, 0], [3, 2]], "misses": [[1, 0], [1, 1]], "tier": [[0, 1], [1, 0]]}
    lines = generation(n=4)
    lines[0]["experts"] = {**told, "uses": [[1, 0], [1, 0]]}
    lines[2]["experts"] = told
    found = read_metrics(written(tmp_path / "m", *lines))
    assert found.runs[0].experts == told
    page = report(found)
    assert "half of 10 choices went to 25 % of 4 experts; 1 was never chosen" in Parsed(page).words
    assert "experts" not in Parsed(report(read_metrics(written(tmp_path / "n", *generation(n=4))))).words.split()


# ---------------------------------------------------------------- what follows from the numbers


def test_where_the_time_of_a_token_went() -> None:
    run = run_of(generation(stall_ms=310, move_ms=40, weight_bytes_read=700 * MIB))
    time = spent(run)
    assert time is not None and time.of == "a generated token" and time.per == 20
    assert time.parts == pytest.approx({"computing": 0.15, "waiting": 0.31, "moving": 0.04})
    first, *rest = findings(run)
    assert first == (
        "62 % of the time of a generated token was spent waiting for reads: a larger budget or a faster disk would "
        "help; about 700 MiB of weights are read for each token."
    )
    assert "400 ms" not in " ".join(rest) and any("800 ms, 8 % of the time, went into moving" in text for text in rest)


def test_a_prompt_and_a_pause_are_no_part_of_a_tokens_time() -> None:
    lines = generation(n=4, weight_bytes_read=100 * MIB)
    last = lines[-1]
    after_a_pause = last | {"timestamp": line(60)["timestamp"], "token": 19, "generated_tokens": 11}
    with_a_prompt = after_a_pause | {
        "timestamp": line(90)["timestamp"], "prompt_tokens": 500, "token": 512, "generated_tokens": 12,
        "stall_ms": 20_000.0, "weight_bytes_read": 90 * GIB,
    }  # fmt: skip
    run = run_of([*lines, after_a_pause, with_a_prompt])
    time = spent(run)
    assert time is not None and time.per == 10 and time.counts.seconds == pytest.approx(5.0)
    assert time.counts.stalled == 0 and time.counts.read == 8 * 100 * MIB
    pause = run.intervals[4]
    assert (pause.start, pause.begin, pause.end) == pytest.approx((4.0, 59.0, 60.0))


def test_a_rate_of_fewer_tokens_than_were_generated_is_not_believed() -> None:
    lines = generation(n=2)
    lines[2]["metrics_dropped"] = 3  # the lines between, whose tokens the last line's rate does not count
    assert [i.counts.generating for i in run_of(lines).intervals] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("each", "words"),
    [
        ({}, "nothing was read while it generated"),
        ({"weight_bytes_read": 1000}, "Reads cost next to nothing: 0 %"),
        ({"weight_bytes_read": 500 * MIB, "stall_ms": 10}, "hidden behind the computation: 2 %"),
        ({"weight_bytes_read": 500 * MIB, "stall_ms": 100}, "20 % of the time of a generated token was spent"),
        ({"weight_bytes_read": 500 * MIB, "stall_ms": 2000}, "100 % of the time of a generated token was spent"),
    ],
)
def test_what_reads_cost(each: dict[str, float], words: str) -> None:
    run = run_of(generation(**each))
    assert words in findings(run)[0]
    assert ("would help" in findings(run)[0]) == (spent(run).counts.stall_share >= 0.3)  # type: ignore[union-attr]


def test_what_more_memory_gives_a_dense_model() -> None:
    """Two thirds of the reads go, and so do two thirds of the waiting: half a second becomes a sixth."""
    (said,) = (
        s for s in findings(run_of(generation(stall_ms=300, weight_bytes_read=3 * GIB / 2))) if "With 1 GiB" in s
    )
    assert "1 GiB less would be read" in said and "about 3.33 tokens/s instead of 2" in said
    assert "if the waiting falls as the reads do and each pass over the weights computes one token" in said
    (said,) = (s for s in findings(run_of(generation(stall_ms=250, weight_bytes_read=300 * MIB))) if "With about" in s)
    assert said.startswith(
        "With about 300 MiB more of budget, nothing would have to be read: about 4 tokens/s instead of 2,"
    )


@pytest.mark.parametrize(
    "each",
    [{"expert_hits": 3, "expert_misses": 1}, {"kv_bytes_read": 10}, {"stall_ms": 40}, {"weight_bytes_read": 1000}],
    ids=str,
)
def test_what_more_memory_gives_is_not_said_where_nobody_knows(each: dict[str, float]) -> None:
    both = {"stall_ms": 300, "weight_bytes_read": 3 * GIB, **each}
    assert not [said for said in findings(run_of(generation(**both))) if said.startswith("With ")]


def test_experts() -> None:
    run = run_of(generation(expert_hits=30, expert_misses=10, expert_guesses=8, expert_guesses_used=6))
    assert (
        "75 % of the experts were in memory when they were asked for; of 160 read on a guess, 75 % were then chosen."
        in (findings(run))
    )
    assert [chart.title for chart in charts(run)[1]].count("Experts found in memory") == 1
    assert "Experts found in memory" not in [chart.title for chart in charts(run_of(generation()))[1]]


def test_what_else_is_worth_a_sentence() -> None:
    lines = generation(kv_pages_evicted=1, kv_bytes_written=5e6, prefetch_failed=1, kv_pages_disk=1)
    lines[5]["mem_budget_bytes"] = GIB
    lines[9]["metrics_dropped"] = lines[10]["metrics_dropped"] = 7
    said = findings(run_of([values | {"prefetch_failed": int(values["prefetch_failed"])} for values in lines]))
    assert "20 KV pages had to leave memory: 100 MB were written, 0 B read back." in said
    assert "The budget changed while it ran, between 1 GiB and 4 GiB." in said
    assert "20 reads ahead failed." in said
    assert any("7 lines are missing" in text for text in said)


def test_reads_that_were_not_ahead() -> None:
    waits = {"stall_ms": 250, "weight_bytes_read": GIB}
    assert "--async-prefetch" not in " ".join(findings(run_of(generation(**waits))))
    alone = run_of(generation(first={"prefetch_completed": 0}, **waits))
    assert any("Nothing was read ahead" in text for text in findings(alone))


def test_without_dynamic_layers_nothing_is_known_of_reads() -> None:
    lines = [values | {"mem_budget_bytes": 0, "memory_by_tag": {"pinned": 0}} for values in generation()]
    run = run_of(lines)
    assert len(findings(run)) == 1 and "without dynamic layers" in findings(run)[0]
    assert [chart.title for chart in charts(run)[1]] == ["Tokens per second"]


def test_a_run_without_generation_is_told_as_a_whole() -> None:
    lines = [line(i, prompt_tokens=512 * i, stall_ms=400 * i, weight_bytes_read=GIB * i) for i in range(5)]
    assert findings(run_of(lines))[0].startswith("40 % of the time was spent waiting for reads")
    assert findings(run_of(lines[:1])) == ["Too little was computed for anything to follow from it."]


# ---------------------------------------------------------------- pictures


def test_columns_keep_all_that_happened() -> None:
    run = run_of(generation(n=3 * 4 * KEPT, seconds=0.1, weight_bytes_read=1000, expert_hits=1))
    assert KEPT / 2 < len(run.intervals) <= 4 * KEPT
    for n in (7, 100):
        columns = run.columns(n)
        assert n / 2 <= len(columns) <= 2 * n
        for name in ("generated", "read", "hits", "seconds"):
            assert sum(getattr(c.counts, name) for c in columns) == pytest.approx(getattr(run.total, name))
        assert all(a.end == b.start for a, b in itertools.pairwise(columns))


def test_a_context_that_ends_is_shown_as_it_was() -> None:
    lines = generation(n=3)
    lines[3] |= {"event": "final", "memory_by_tag": {"pinned": GIB}}
    run = run_of(lines)
    assert run.ended and run.intervals[-1].line.used == run.peak.used == 3 * GIB + 264 * MIB


def test_stacks_add_up_and_stay_inside() -> None:
    run = run_of(generation())
    _, pictures = charts(run)
    by_title = {chart.title: chart for chart in pictures}
    stack = by_title["Memory by what it is for"].series
    assert [series.name for series in stack] == ["kv", "ring", "pinned", "budget"]  # the uppermost is drawn first
    tops = [min(map(float, re.findall(r"[MV](?:[\d.]+ 100V)?([\d.]+)", s.path.replace("V100Z", "")))) for s in stack]
    assert tops == sorted(tops[:-1]) + tops[-1:] and 0 <= tops[-1] < tops[0]  # the budget is above what is in use
    layers = by_title["Layers by tier"].series
    assert [(series.name, series.rest) for series in layers] == [("read when needed", "10"), ("in memory", "20")]


@pytest.mark.parametrize("most", [1e-4, 0.7, 1, 3, 9.99, 10, 132, 47_000, 3.3e9])
def test_scales_have_few_round_steps(most: float) -> None:
    for base in (2, 10):
        scale = _drawing.ticks(most, base=base)
        assert 3 <= len(scale) <= 9 and scale[-2] < most <= scale[-1] * (1 + 1e-9)
    assert _drawing.ticks(most, n=2, least=1)[1] >= 1
    moments = _drawing.time_ticks(most)
    assert len(moments) <= 8 and all(0 <= left <= 100 + 1e-9 for left, _ in moments)


def test_steps_with_a_gap() -> None:
    steps = [(0.0, 1.0, 5.0), (1.0, 2.0, 10.0), (3.0, 4.0, 5.0)]
    assert _drawing.path(steps, 4, 10, area=False) == "M0 50H25V0H50M75 50H100"
    assert _drawing.path(steps, 4, 10, area=True) == "M0 100V50H25V0H50V100ZM75 100V50H100V100Z"
    assert _drawing.path([], 4, 10, area=True) == ""


def test_colours_stand_out_from_both_grounds() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    css = (Path(_drawing.__file__).parent / "templates" / "report.css").read_text()
    grounds = re.findall(r"--ground: (#[0-9a-f]+)", css)
    assert len(grounds) == 2
    for ground in (g if len(g) == 7 else "#" + "".join(2 * c for c in g[1:]) for g in grounds):
        for colour in {*_drawing.TAG_COLOURS.values(), *_drawing.TIER_COLOURS.values(), _drawing.GREY}:
            low, high = sorted((luminance(colour), luminance(ground)))
            assert (high + 0.05) / (low + 0.05) >= 3, (colour, ground)


def test_amounts() -> None:
    assert [memory(n) for n in (0, 1023, 300 * MIB, 1.5 * GIB, 123 * GIB)] == [
        "0 B",
        "1023 B",
        "300 MiB",
        "1.50 GiB",
        "123 GiB",
    ]
    assert [volume(n) for n in (999, 1000, 21_188_640_768, 2e12)] == ["999 B", "1 kB", "21.2 GB", "2 TB"]
    assert [number(x) for x in (0, 2.418, 16.04, 99.96, 1040.2)] == ["0", "2.42", "16.0", "100", "1,040"]
    assert [share(x) for x in (0, 0.004, 0.616, 0.998, 1)] == [
        "0 %",
        "less than 1 %",
        "62 %",
        "more than 99 %",
        "100 %",
    ]
    assert [duration(s) for s in (0.413, 25.71, 200, 3599.7, 7500)] == [
        "413 ms",
        "25.7 s",
        "3 min 20 s",
        "60 min",
        "2 h 5 min",
    ]


# ---------------------------------------------------------------- files


def test_contexts_of_one_file(tmp_path: Path) -> None:
    """One after the other, and two in turns."""
    one = generation(n=3, weight_bytes_read=5)
    one[-1]["event"] = "final"
    two = [v | {"timestamp": line(10 + i)["timestamp"]} for i, v in enumerate(generation(n=6, tokens=50))]
    few = generation(n=6, tokens=1, first={"prompt_tokens": 2})
    three = [v | {"timestamp": line(10.5 + i)["timestamp"]} for i, v in enumerate(few)]
    turns = [values for pair in zip(two, three, strict=True) for values in pair]
    found = read_metrics(written(tmp_path / "m", *one, *turns))
    assert [(run.n_lines, run.last.generated_tokens) for run in found.runs] == [(4, 7), (7, 301), (7, 7)]
    assert found.longest() == 2
    page = report(found)
    assert "Contexts in this file" in page and "those of one model share its memory" in page
    assert ">301 tokens<" in page and ">7 tokens<" in report(found, 3)
    with pytest.raises(Error, match=r"no context 4 in .*, only 3"):
        report(found, 4)


def test_a_process_that_was_killed_and_another_one(tmp_path: Path) -> None:
    """The second one goes past the counters of the first, which has written nothing for long."""
    first, second = (
        generation(n=5),
        [v | {"timestamp": line(100 + i)["timestamp"]} for i, v in enumerate(generation(n=20))],
    )
    found = read_metrics(written(tmp_path / "m", *first, *second))
    assert [run.n_lines for run in found.runs] == [6, 21]


def test_lines_that_are_none_are_counted(tmp_path: Path) -> None:
    good = generation(n=4)
    lines = [good[0], "", "log: loading", '{"timestamp": "now"}', *good[1:3], "\0" * 500, "[1, 2]", "x" * 5_000_000]
    found = read_metrics(written(tmp_path / "m", *lines, good[3]))
    assert (found.runs[0].n_lines, found.n_skipped, found.cut) == (4, 6, False)  # the longest one is two pieces
    assert "6 lines are no metrics, and left out" in report(found)


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = written(tmp_path / "m", *generation(n=3))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # the end of a line is not there, but all of the line
    assert (read_metrics(path).runs[0].n_lines, read_metrics(path).cut) == (4, False)
    path.write_bytes(whole[:-100])
    found = read_metrics(path)
    assert (found.runs[0].n_lines, found.n_skipped, found.cut) == (3, 0, True)
    assert "cut off" in report(found)
    path.write_bytes(whole[:100])
    with pytest.raises(Error, match="in the middle of its first line"):
        read_metrics(path)


def test_lines_of_a_log_and_indented_ones(tmp_path: Path) -> None:
    good = generation(n=3)
    log = ["srv: hello", *(f"[METRICS] {json.dumps(values)}" for values in good), "srv: bye"]
    assert read_metrics(written(tmp_path / "log", *log)).runs[0].n_lines == 4
    tags = {values["timestamp"]: json.dumps(values.pop("memory_by_tag")) for values in good}
    indented = []
    for values in good:
        body = [f"  {json.dumps(name)}: {json.dumps(value)}," for name, value in values.items()]
        indented += ["{", *body, f'  "memory_by_tag": {tags[values["timestamp"]]}', "}"]
    for prefix in ("", "[METRICS] "):
        found = read_metrics(written(tmp_path / "indented", *(prefix + text for text in indented)))
        assert (found.runs[0].n_lines, found.n_skipped) == (4, 0)


def test_fields_of_another_version_are_left_alone(tmp_path: Path) -> None:
    lines = [values | {"new": 1, "memory_by_tag": {"pinned": 1, "<new>": 5 * GIB}} for values in generation()]
    lines[0]["sequences"] = [{"sequence": 0, "new": 1}]
    lines[0]["devices"] = [{"device": "GPU0", "new": 1}]
    found = read_metrics(written(tmp_path / "m", *lines))
    page = report(found)
    assert "&lt;new&gt;" in page and "<new>" not in page
    assert (found.n_lines, found.n_skipped) == (len(lines), 0)


def test_sequences_and_devices_are_among_the_counters(tmp_path: Path) -> None:
    lines = generation()
    lines[-1]["sequences"] = [{"sequence": n, "generated_tokens": 1234 * n, "kv_tokens": 9} for n in (1, 3)]
    lines[-1]["devices"] = [{"device": "<GPU0>", "bytes_up": 5 * MIB}]
    words = " ".join(Parsed(report(read_metrics(written(tmp_path / "m", *lines)))).words.split())
    assert "sequence 1: generated_tokens1,234 sequence 1: kv_tokens9 sequence 3: generated_tokens3,702" in words
    assert "device <GPU0>: bytes_up5,242,880" in words
    for wrong in ({"sequences": [1]}, {"devices": {}}):
        found = read_metrics(written(tmp_path / "n", *generation(n=2), json.dumps(line(9) | wrong)))
        assert (found.n_lines, found.n_skipped) == (4, 1)


def test_a_file_of_an_earlier_version_has_fewer_fields(tmp_path: Path) -> None:
    later = ("threads", "core_wait_ms", "throttled_ms", "experts", "sequences", "devices")
    later += ("expert_device_hits", "expert_device_misses", "expert_host_computed", "weight_bytes_ahead")
    later += ("expert_device_guesses", "expert_device_guesses_used")
    lines = generation(stall_ms=310)
    old = [{name: value for name, value in values.items() if name not in later} for values in lines]
    found = read_metrics(written(tmp_path / "m", *old))
    assert (found.n_lines, found.n_skipped) == (len(lines), 0)
    assert report(found) == report(read_metrics(written(tmp_path / "m", *lines)))


@pytest.mark.skipif(os.name == "nt", reason="a FIFO in a folder is Unix's")
def test_what_is_no_file_is_an_error_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    written(tmp_path / "text", "hello")
    for name, why in (
        ("fifo", "FIFO"),
        ("", "a folder"),
        ("empty", "is empty"),
        ("text", "no metrics line"),
        ("nix", "No such"),
    ):
        assert cli.main(["report", str(tmp_path / name)]) == 1
        told = capsys.readouterr()
        assert why in told.err and told.err.startswith("superllama: ") and not told.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "fifo", "text"]


def test_only_a_report_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = written(tmp_path / "run.jsonl", *generation())
    for _ in range(2):
        assert cli.main(["report", str(run)]) == 0
        assert capsys.readouterr().out == f"wrote {tmp_path / 'run.html'}\n"
    mine = written(tmp_path / "mine.html", "<p>mine")
    with pytest.raises(Error, match=r"mine\.html is there and is no report"):
        write_report(run, mine)
    assert mine.read_text() == "<p>mine\n"
    with pytest.raises(Error, match=r"run\.jsonl is there and is no report"):
        write_report(run, run)
    assert cli.main(["report", str(run), "-o", str(tmp_path / "other"), "--context", "1"]) == 0
    assert (tmp_path / "other").read_text().startswith(MARK)


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    each = {
        "stall_ms": 100,
        "weight_bytes_read": GIB,
        "expert_hits": 3,
        "expert_misses": 1,
        "kv_pages_cpu": 1,
        "move_ms": 5,
    }
    path = written(tmp_path_factory.mktemp("run") / "<b>&run.jsonl", *generation(**each))
    return report(read_metrics(path))


def test_the_page_is_whole_and_holds_all_that_it_needs(page: str) -> None:
    parsed = Parsed(page)
    assert parsed.links == ["data:,"] and parsed.tags.count("svg") == 7 + 1
    assert not re.search(r"(https?:)?//[a-z]|@import|url\(", page)
    assert "default-src 'none'" in page
    for picture in re.findall(r"<svg.*?</svg>", page, re.S):
        ET.fromstring(picture)


def test_names_are_escaped(page: str) -> None:
    assert "&lt;b&gt;&amp;run.jsonl" in page and "<b>&run" not in page


def test_the_script_is_the_one_that_the_policy_names(page: str) -> None:
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.S)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in page
    (values,) = re.findall(r'<script type="application/json" id="values">(.*?)</script>', page, re.S)
    found = json.loads(values)
    assert all(len(texts) == len(found["ends"]) for chart in found["texts"] for texts in chart)
    legends = re.findall(r'<div class="legend">(.*?)</div>', page, re.S)
    assert [legend.count("<b>") for legend in legends] == [len(chart) for chart in found["texts"]]


def test_an_empty_run_has_a_page_too(tmp_path: Path) -> None:
    found = read_metrics(written(tmp_path / "m", line(prompt_tokens=4)))
    assert isinstance(found, MetricsFile)
    Parsed(report(found))
    at_once = [line(0, generated_tokens=i) for i in range(3)]  # within the clock's millisecond
    Parsed(report(read_metrics(written(tmp_path / "m", *at_once))))
