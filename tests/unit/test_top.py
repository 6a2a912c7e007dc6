"""The picture of `superllama top`: rates, what it says of a token's time, and that it has room where it is shown."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from statuses import MIB, layers, metrics, shown, status

from superllama._top.rates import COUNTERS, Change, History, Sample, change, recent, series
from superllama._top.view import Picture
from superllama._top.why import hint, reason, token_time

TAGS = "resident rows vocabulary pinned ring experts staging kv compute cpu_work outputs prompt_cache".split()  # noqa: SIM905


def samples(*steps: Mapping[str, float], seconds: float = 1) -> list[Sample]:
    """One after the other, each with what was counted since the one before."""
    counts = dict.fromkeys(COUNTERS, 0.0)
    found = [Sample(100.0, dict(counts))]
    for step in steps:
        counts = {name: counts[name] + step.get(name, 0) for name in COUNTERS}
        found.append(Sample(found[-1].at + seconds, counts))
    return found


# ---------------------------------------------------------------- rates


def test_rates_are_differences_over_the_time_between_samples() -> None:
    before = Sample.of(metrics(0, generated_tokens=10, weight_bytes_read=5 * 10**6, stall_ms=100.0))
    after = Sample.of(metrics(2, generated_tokens=30, weight_bytes_read=9 * 10**6, stall_ms=600.0))
    found = change(before, after)
    assert found is not None and found.seconds == 2
    assert found.per_second("generated_tokens") == 10
    assert found.per_second("weight_bytes_read", "kv_bytes_read") == 2 * 10**6
    assert found.stalled == 0.25


def test_a_restart_gives_no_rate_and_what_follows_it_does() -> None:
    old, new = samples({"generated_tokens": 100}), samples({"generated_tokens": 5})
    new = [Sample(sample.at + 10, sample.counts) for sample in new]
    assert change(old[-1], new[0]) is None
    assert recent([*old, new[0]]) is None
    found = recent([*old, *new])
    assert found is not None and found.per_second("generated_tokens") == 5


def test_samples_of_one_moment_give_no_rate() -> None:
    sample = samples()[0]
    assert change(sample, sample) is None and recent([sample]) is None and recent([]) is None


@settings(deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=60))
def test_recent_rates_are_those_of_the_last_five_seconds(tokens: list[int]) -> None:
    found = recent(samples(*({"generated_tokens": n} for n in tokens)))
    assert found is not None
    last = tokens[-5:]
    assert found.per_second("generated_tokens") == sum(last) / len(last)
    assert found.steady == (0 not in last)


def test_where_tokens_take_seconds_more_of_them_are_looked_at() -> None:
    read = {"weight_bytes_read": 10**9}
    slow = [read | {"generated_tokens": i % 3 == 0} for i in range(30)]
    found = recent(samples(*slow))
    assert found is not None and found.seconds == 20
    idle = recent(samples(*slow, *[{}] * 5))
    assert idle is not None and idle.seconds == 5 and idle.counts["generated_tokens"] == 0


def test_the_history_in_steps_has_no_value_where_nothing_is_known() -> None:
    found = samples(*[{"generated_tokens": 4}] * 4)  # seconds 100 to 104
    later = [Sample(sample.at + 10, sample.counts) for sample in samples(*[{"generated_tokens": 2}] * 2)]  # 110 to 112
    assert series([*found, *later], ["generated_tokens"], 112, 7, 2) == [None, 4, 4, None, None, None, 2]
    assert series([], ["generated_tokens"], 112, 3, 2) == [None] * 3


def test_the_history_of_a_file_with_a_line_for_every_token_stays_small() -> None:
    history = History()
    for i in range(10_000):
        history.add(Sample(i / 100, dict.fromkeys(COUNTERS, float(i))))
    found = history.samples()
    assert len(found) < 250 and found[-1].at == 99.99
    assert recent(found).per_second("generated_tokens") == pytest.approx(100)  # type: ignore[union-attr]


def test_what_is_older_than_the_picture_is_forgotten() -> None:
    history = History()
    for i in range(1000):
        history.add(Sample(float(i), dict.fromkeys(COUNTERS, 0.0)))
    assert history.samples()[0].at == 999 - 300


# ---------------------------------------------------------------- why


def of_a_second(**counts: float) -> Change:
    found = change(*samples(counts))
    assert found is not None
    return found


def test_the_time_of_a_token_is_made_of_waiting_moving_and_the_rest() -> None:
    token = token_time(
        of_a_second(generated_tokens=10, stall_ms=600, move_ms=100, weight_bytes_read=50, kv_bytes_read=10)
    )
    assert token is not None
    assert (token.whole, token.reads, token.moves, token.bytes_read) == (0.1, 0.06, 0.01, 6)
    assert token.rest == pytest.approx(0.03) and token.largest == "reads"


@settings(deadline=None)
@given(st.integers(1, 1000), st.floats(0, 1e5), st.floats(0, 1e5))
def test_its_parts_are_never_more_than_the_whole(tokens: int, stall_ms: float, move_ms: float) -> None:
    token = token_time(of_a_second(generated_tokens=tokens, stall_ms=stall_ms, move_ms=move_ms))
    assert token is not None and min(token.reads, token.moves) >= 0 and token.rest >= -1e-9


@pytest.mark.parametrize(
    ("counts", "why"),
    [
        ({}, "idle"),
        ({"prompt_tokens": 9, "stall_ms": 500}, "a prompt is computed; 50 % "),
        ({"weight_bytes_read": 10**9, "stall_ms": 900}, "no token in 1 s; 90 % "),
        ({"generated_tokens": 10}, "nothing is read"),
        ({"generated_tokens": 10, "weight_bytes_read": 10**9, "stall_ms": 900}, "disk: 100 MB a token, at 1 GB/s"),
        ({"generated_tokens": 10, "weight_bytes_read": 10**9, "stall_ms": 90}, "computes: 100 MB a token are"),
        ({"generated_tokens": 10, "weight_bytes_read": 10**9, "stall_ms": 400}, "waiting for reads: 100 MB"),
        ({"generated_tokens": 10, "weight_bytes_read": 10**9, "prompt_tokens": 9}, "a prompt in between"),
        ({"generated_tokens": 10, "move_ms": 700}, "layers that move"),
    ],
)  # fmt: skip
def test_reasons(counts: dict[str, float], why: str) -> None:
    assert why in reason(of_a_second(**counts))


@settings(deadline=None)
@given(
    st.fixed_dictionaries(dict.fromkeys(("generated_tokens", "prompt_tokens"), st.integers(0, 10**4))),
    st.floats(0, 1000),
    st.integers(0, 10**12),
)
def test_a_reason_has_room_in_its_line(tokens: dict[str, int], stall_ms: float, n_bytes: int) -> None:
    assert len(reason(of_a_second(**tokens, stall_ms=stall_ms, weight_bytes_read=n_bytes))) <= 70


def test_a_hint_is_what_would_help() -> None:
    waits = of_a_second(generated_tokens=10, stall_ms=500)
    assert "--async-prefetch" in hint(waits, metrics(), may_change=True)
    assert "key +" in hint(waits, metrics(prefetch_completed=1), may_change=True)
    assert "--mem-budget" in hint(waits, metrics(prefetch_completed=1), may_change=False)
    assert hint(of_a_second(generated_tokens=10, stall_ms=50), metrics(), may_change=True) == ""


# ---------------------------------------------------------------- the picture

BUSY = samples(*[{"generated_tokens": 12, "prompt_tokens": 4, "weight_bytes_read": 10**9, "stall_ms": 370}] * 100)
FULL = status(
    state="ready",
    requests_in_flight=2,
    layers=layers(*["host", "disk"] * 40, *["device"] * 40, share=0.5),
    metrics=metrics(
        mem_budget_bytes=1000 * MIB,
        memory_by_tag=dict.fromkeys(TAGS, 80 * MIB),
        vram_budget_bytes=400 * MIB,
        vram_own_bytes=100 * MIB,
        expert_hits=90,
        expert_misses=10,
        expert_guesses=20,
        expert_guesses_used=10,
        kv_pages_cpu=12,
        kv_pages_disk=3,
        kv_pages_gpu=1,
        kv_pages_evicted=5,
    ),
)
MANY = {
    "everything": FULL,
    "little": status(),
    "not dynamic": status(dynamic_layers=False, layers=[], metrics=metrics(mem_budget_bytes=0)),
    "paused": {key: value for key, value in status(state="paused").items() if key not in ("metrics", "layers")},
    "of a file": {"metrics": metrics(cpu_layers_active=10, disk_layers_active=20)},
    "large": status(
        layers=layers(*["disk"] * 300),
        metrics=metrics(mem_budget_bytes=10**13, memory_by_tag=dict.fromkeys(TAGS, 10**12), vram_budget_bytes=10**13),
    ),
    "nothing": None,
}


@pytest.mark.parametrize("name", MANY)
@pytest.mark.parametrize("help", [False, True])
def test_the_picture_has_room_in_80_columns_and_24_lines(name: str, help: bool) -> None:
    picture = Picture("http://" + "x" * 100, BUSY, MANY[name], keys="q quit", message="m" * 100, help=help)
    for width, height in ((80, 24), (200, 60), (20, 5), (1, 1)):
        lines = shown(picture, width, height)
        assert len(lines) == height and max(map(len, lines)) <= width
    assert len(shown(picture)) <= 40  # printed once, as long as it is


def test_everything_there_can_be_has_room_in_24_lines() -> None:
    lines = shown(Picture("http://127.0.0.1:8080", BUSY, FULL, keys="q quit", message="done"), 80, 24)
    assert lines[-2:] == ["q quit", "done"]
    text = "\n".join(lines)
    for label in "token layers experts KV generated prompt reads stalled memory devices".split():  # noqa: SIM905
        assert f"\n{label} " in text


def test_what_is_shown() -> None:
    text = "\n".join(shown(Picture("http://127.0.0.1:8080", BUSY, FULL)))
    for part in (
        *("superllama 0.1.0  http://127.0.0.1:8080", "ready, 2 requests in flight"),
        *("12 tok/s", "4 tok/s", "1,000 MB/s", "37 %"),
        *("83.3 ms", "30.8 ms waiting for reads", "52.5 ms computing or idle"),
        *(
            "\nlayers  0 " + "█▒" * 35 + "\n       70 " + "█▒" * 5 + "▣" * 40,
            "█ 40 in memory",
            "▣ 40 on devices",
            "▒▓ 40 stream from disk: 40 MiB",
        ),
        *("960 MiB of 1,000 MiB", "100 MiB of 400 MiB", "prompt_cache   80 MiB"),
        *("90 % since the start; 50 % of guesses used", "1 on devices, 12 in memory, 3 on disk; 5 evicted"),
    ):
        assert part in text, text


@pytest.mark.parametrize(("share", "mark"), [(0, "░"), (0.3, "░"), (0.5, "▒"), (0.7, "▓"), (0.99, "▓")])
def test_a_layer_on_disk_is_the_darker_the_more_of_it_stays(share: float, mark: str) -> None:
    text = "\n".join(shown(Picture("url", BUSY, status(layers=layers("host", "disk", share=share)))))
    assert f"layers  0 █{mark}\n" in text


def test_a_file_shows_how_many_layers_are_where() -> None:
    text = "\n".join(shown(Picture("m.jsonl", BUSY, MANY["of a file"])))
    assert "layers    █ 10 in memory  ░▒▓ 20 stream from disk" in text


def test_a_paused_server_has_no_memory_to_show() -> None:
    text = "\n".join(shown(Picture("url", BUSY, MANY["paused"])))
    assert "paused" in text and "given back" in text and "tok/s" not in text


def test_rates_of_a_server_that_went_away_are_not_shown_as_those_of_now() -> None:
    gone = Picture("url", BUSY, FULL, age=20, problem="url: no server answers there")
    text = "\n".join(shown(gone))
    assert "no answer for 20 s" in text and "no server answers there" in text
    assert "12 tok/s" not in text and "    - tok/s" in text
    silent = "\n".join(shown(Picture("url", BUSY, FULL, age=20)))
    assert "no answer for 20 s" in silent and "12 tok/s" not in silent


def test_a_file_has_rates_as_long_as_its_lines_come_as_they_came() -> None:
    rare = samples(*[{"generated_tokens": 100}] * 3, seconds=10)
    for age, there in ((15, True), (25, False)):
        text = "\n".join(shown(Picture("m.jsonl", rare, MANY["of a file"], age=age)))
        assert ("10 tok/s" in text) == there
        assert ("no line for 25 s" in text) != there
    ended = {"metrics": metrics(event="final")}
    text = "\n".join(shown(Picture("m.jsonl", rare, ended, age=10**6)))
    assert "ended" in text and "max 10" in text


def test_terminals_without_unicode_get_ascii() -> None:
    lines = shown(Picture("http://bücher.example", BUSY, FULL, message="größer"), encoding="ascii")
    assert "#:" * 35 in "\n".join(lines) and "D" * 20 in "\n".join(lines)


def test_what_a_server_says_moves_no_cursor() -> None:
    evil = "\033[2J\a\x9b31m\n"
    found = status(version=evil, state=evil, metrics=metrics(memory_by_tag={evil: 10 * MIB}))
    text = "\n".join(shown(Picture(evil, BUSY, found, problem=evil, message=evil, keys="q quit")))
    assert "\033" not in text and "\a" not in text and "\x9b" not in text


@settings(deadline=None)
@given(st.integers(0, 10**15), st.integers(1, 10**15), st.integers(20, 200))
def test_bars_have_their_width(used: int, budget: int, width: int) -> None:
    found = status(metrics=metrics(mem_budget_bytes=budget, memory_by_tag={"kv": used, "ring": used // 3}))
    assert max(map(len, shown(Picture("url", BUSY, found), width))) <= width
