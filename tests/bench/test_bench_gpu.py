"""gpu.py without a card: stock's placement, the bound, the table, and what it says where there is none."""

import contextlib
import json
import os
import subprocess
from pathlib import Path

import pytest
from bench import card, gpu, gpu_report, gpu_runs, gpu_saturation, placement
from bench.bound import CardLimits, Weights
from bench.gpu_turn import OUT_OF_MEMORY, Result
from bench.peak import Peak
from bench.placement import ALL, MIB, Placement
from rpc_devices import hide_gpus
from serving import until

ROOT = Path(__file__).resolve().parents[2]

# ---------------------------------------------------------------- stock's best placement


@pytest.mark.parametrize("limit", [99, 100, 149, 150, 155, 1000, 4899, 4900, 5050, 10**6])
@pytest.mark.parametrize("fits", [10**9, 2000])  # where peaks above that cannot be measured
def test_the_most_that_fits(limit: int, fits: int) -> None:
    asked = []

    def peak(n: int) -> int | None:
        asked.append(n)
        bytes_there = 100 + 50 * n + (2000 if n == 97 else 0)  # the output, which is larger than a layer
        return bytes_there if bytes_there <= fits else None

    expected = [n for n in range(98) if (p := peak(n)) is not None and p <= limit]
    asked.clear()
    assert placement.most(peak, limit, 97) == (expected[-1] if expected else None)
    assert len(asked) == len(set(asked)) <= 13


def test_few_are_asked_for_where_peaks_are_on_a_line() -> None:
    asked: list[int] = []
    assert placement.most(lambda n: asked.append(n) or 100 + 50 * n, 1020, 77) == 18
    assert len(asked) <= 5


class Moe:
    """A model of 8 layers: 10 MiB of a layer's attention, 100 of its experts, 5 of buffers. Caches take 2 MiB more."""

    def __init__(self, speeds: dict[str, float] | None = None) -> None:
        self.speeds = speeds or {}

    def peak(self, where: Placement) -> int:
        layers = min(8, where.n_gpu_layers)
        of_experts = layers - min(layers, where.n_cpu_moe)
        cache = where.cache_mib + 2 if where.cache_mib else 0
        return (5 + 10 * layers + 100 * of_experts + cache) * MIB

    def speed(self, where: Placement) -> float:
        return self.speeds.get(str(where), 1.0)

    def best(self, mib: int) -> str:
        return str(placement.best(self.peak, self.speed, mib * MIB, 8, moe=True))


def test_experts_are_placed_by_layers_or_cached() -> None:
    assert Moe().best(300) == "-ngl 99 -ncmoe 6"  # 285 MiB; the cache is no faster
    faster = Moe({"-ngl 99 -cmoe --moe-cache-mib 213": 2.0})
    assert faster.best(300) == "-ngl 99 -cmoe --moe-cache-mib 213"  # 300 - 85 - 2
    assert faster.peak(Placement(ALL, ALL, 213)) == 300 * MIB


@pytest.mark.parametrize(
    ("mib", "expected"), [(4, "None"), (60, "-ngl 5 -cmoe"), (87, "-ngl 99 -cmoe"), (9999, "-ngl 99")]
)
def test_small_and_large_cards(mib: int, expected: str) -> None:
    assert Moe().best(mib) == expected


def test_a_dense_model_counts_its_output() -> None:
    found = placement.best(lambda where: 10 * where.n_gpu_layers, lambda _: 1.0, 90, 8, moe=False)
    assert found == Placement(9)


def test_parameters_are_those_of_the_flags() -> None:
    where = Placement(ALL, 2, 64)
    assert list(where.model_params()["override_tensor"]) == [rf"blk\.{i}{placement.EXPERTS}" for i in (0, 1)]
    assert where.context_params() == {"moe_cache_size": 64 * MIB}
    assert Placement(3).model_params() == {"n_gpu_layers": 3, "override_tensor": {}}
    assert list(Placement(ALL, ALL).model_params()["override_tensor"]) == [placement.EXPERTS]


# ---------------------------------------------------------------- the bound

DENSE = Weights(file_bytes=1100, n_layer=4, needed_bytes=1000)
EXPERTS = Weights(file_bytes=1100, n_layer=4, needed_bytes=1000, expert_bytes=10, n_experts=80, n_used=8)


def test_missing_bytes() -> None:
    assert [DENSE.missing(vram) for vram in (0, 400, 1000, 2000)] == [1000, 600, 0, 0]
    assert EXPERTS.token_bytes == 280  # 200 of every token, 8 experts
    assert EXPERTS.missing(100) == 180  # a half of what every token needs, and all its experts
    assert EXPERTS.missing(200) == 80
    assert EXPERTS.missing(600) == 40  # a half of the experts
    assert [w.host_bytes(600) for w in (DENSE, EXPERTS)] == [400, 400]


def test_decode_is_bound_by_the_slowest() -> None:
    limits = CardLimits(token_s=0.1, prompt_s={}, n_ubatch=4, card_bytes=10**9, ram=300.0, link=100.0, disk=50.0)
    assert limits.decode(DENSE, missing=0) == pytest.approx(10)
    assert limits.decode(DENSE, missing=800) == pytest.approx(0.5)  # 600 by the processor, 200 over the link: 2 s
    assert limits.decode(DENSE, missing=10) == pytest.approx(1 / (0.1 * 0.99))  # the rest on the card takes longer
    assert limits.decode(DENSE, missing=800, from_disk=500) == pytest.approx(0.1)
    unknown = CardLimits(0.0, {}, 4, 10**9, 300.0, 100.0, 50.0)
    assert unknown.decode(DENSE, missing=0) is unknown.prompt(4, host_bytes=0) is None


def test_prompts_need_the_rest_once_in_a_ubatch() -> None:
    limits = CardLimits(token_s=0.1, prompt_s={8: 1.0}, n_ubatch=4, card_bytes=10**9, ram=300.0, link=100.0, disk=50.0)
    assert limits.prompt(8, host_bytes=0) == pytest.approx(8)
    assert limits.prompt(8, host_bytes=200) == pytest.approx(8 / 4)
    assert limits.prompt(5, host_bytes=200) == pytest.approx(5 / 4)  # as many ubatches
    assert limits.prompt(8, host_bytes=200, from_disk=150) == pytest.approx(8 / 6)


# ---------------------------------------------------------------- the table

LIMITS = CardLimits(token_s=0.001, prompt_s={512: 0.1}, n_ubatch=512, card_bytes=700_000, ram=3e6, link=1e6, disk=1e5)
BIG = Weights(file_bytes=1_100_000, n_layer=4, needed_bytes=1_000_000)


def a_turn(decode: float, **more) -> Result:
    return Result(**{"first_token_s": 0.5, "prompt": {"512": 20 * decode}, "decode": decode,
                     "vram_bytes": 600_000_000} | more)  # fmt: skip


def cells(row: gpu_report.Row) -> dict[str, str]:
    """By the head of the column; those of pairs have a number."""
    heads = [head.strip() for head in gpu_report.head([512]).splitlines()[0].strip("|").split("|")]
    values = gpu_report.text(row, [512], BIG, LIMITS).strip("|").split("|")
    return {f"{head} {i}": value.strip() for i, (head, value) in enumerate(zip(heads, values, strict=True))}


def test_a_row() -> None:
    ours = [a_turn(d, link_bytes=2e6, host_misses=0.0, device_hits=6.0, device_misses=2.0) for d in (3.0, 4.0, 5.0)]
    row = gpu_report.Row(60, 600_000, None, Placement(3), [a_turn(2.0), a_turn(1.0), a_turn(2.5)], ours)
    assert list(cells(row).values()) == [
        *("60 %, 600.0 KB", "all", "`-ngl 3`", "40.0", "80.0", "2.00", "2.0", "4.0", "2.00", "0.50", "0.50"),
        *("600", "600", "2.0", "75%"),
        *("1280", "0.06"),  # 512 tokens in 0.4 s
        *("10.0", "0.40"),  # 400 KB at 4 MB/s
    ]


def test_host_budgets_bound_by_the_disk() -> None:
    row = gpu_report.Row(60, 600_000, 300_000, Placement(3), [a_turn(0.5)], [a_turn(0.5)])
    assert gpu_report.bounds(row, 512, BIG, LIMITS) == (pytest.approx(512), pytest.approx(1))  # 100 KB at 100 KB/s
    experts = Weights(1_100_000, 4, 1_000_000, expert_bytes=1000, n_experts=800, n_used=8)
    row.ours = [a_turn(0.5, host_misses=5.0, device_misses=7.0)]
    assert gpu_report.bounds(row, 512, experts, LIMITS)[1] == pytest.approx(20)  # 5 KB at 100 KB/s
    row.host_budget = None
    assert gpu_report.bounds(row, 512, experts, LIMITS)[1] == pytest.approx(4e6 / 7000)


def test_a_card_that_is_smaller_than_the_budget() -> None:
    row = gpu_report.Row(100, 1_100_000, None, Placement(3), [a_turn(2.0)], [a_turn(4.0)])
    assert gpu_report.bounds(row, 512, BIG, LIMITS)[1] == pytest.approx(1 / 0.075)  # 300 KB at 4 MB/s


def test_a_row_says_what_went_wrong() -> None:
    wrong = "ModelError: 28 MiB are too few | for this model"
    row = gpu_report.Row(15, 150, 500, Placement(0), [Result(error=OUT_OF_MEMORY)], [Result(error=wrong)])
    shown = list(cells(row).values())
    assert shown[3:6] == shown[6:9] == [OUT_OF_MEMORY, "failed", "-"]
    assert gpu_report.failures(row) == [f"- superllama, VRAM 15 %, host 500 B: {wrong}"]
    one_failed = gpu_report.Row(15, 150, None, Placement(0), [a_turn(2.0), Result(error="x")], [a_turn(4.0)] * 2)
    assert list(cells(one_failed).values())[6:9] == ["2.0", "4.0", "2.00"]


def test_results_of_processes() -> None:
    assert gpu_runs.result_of('{"decode": 2.0}\n', "", 0).decode == 2.0
    for said in ("ggml_vulkan: ErrorOutOfDeviceMemory", "CUDA error: out of memory", "failed to allocate CUDA0 buffer"):
        assert gpu_runs.result_of("", f"{said}\nterminated", -6).error == OUT_OF_MEMORY
    assert gpu_runs.result_of(json.dumps({"error": "ModelError: no"}), "", 1).error == "ModelError: no"
    assert gpu_runs.result_of("", "", -11).error == "ended with -11 and said nothing"


class FakeRunner(gpu_runs.Runner):
    """Takes 50 bytes of the card for each layer there, as many as the budget allows."""

    def run(self, spec, host=None):
        layers = spec.model_params.get("n_gpu_layers", spec.model_params.get("vram_budget", 0) // 50)
        ran.append((layers, spec.tokens, host))
        return a_turn(layers + 1.0, vram_bytes=min(layers, 5) * 50)


ran: list[tuple] = []


def test_limits_are_what_was_measured() -> None:
    here = card.Card("C", "", "", 900, 1000, card.Speeds(0.0, 7.0, 30.0))
    found = gpu.limits_of(Result(prompt={"512": 1024.0}, decode=20.0), here, 2.0, 256)
    assert found == CardLimits(0.05, {512: 0.5}, 256, 900, 30.0, 7.0, 2.0)
    assert gpu.limits_of(Result(error=OUT_OF_MEMORY), here, 2.0, 256).token_s == 0


def test_turns_alternate() -> None:
    ran.clear()
    runner = FakeRunner(Path("m.gguf"), [512], 48, 1, 512, None, 0, False)
    row = gpu.measure(gpu_runs.Stock(runner, Weights(300, 4, 300)), share=50, host=50, turns=3)
    assert (row.vram_budget, row.host_budget, row.where) == (150, 150, Placement(3))
    full = [layers for layers, tokens, host in ran if tokens == 48]
    assert full == [3] * 6
    assert [host for _, tokens, host in ran if tokens == 48] == [150] * 6
    assert all(host is None for _, tokens, host in ran if tokens == 1)  # peaks are looked for with all of the memory
    assert len(row.stock) == len(row.ours) == 3


# ---------------------------------------------------------------- memory taken and given back


def test_what_another_program_takes() -> None:
    assert gpu_saturation.to_take(total=1000, free=400, own=600) == 550  # half of the model has to leave
    assert gpu_saturation.to_take(total=1000, free=800, own=100) == 800
    assert gpu_saturation.to_take(total=100_000, free=90_000, own=10_000) == 80_000


def test_speeds_are_of_some_time() -> None:
    points = [(i / 10, 0) for i in range(11)]
    assert gpu_saturation.speeds(points, bin_s=0.45) == [(0.25, pytest.approx(10)), (0.75, pytest.approx(10))]
    assert gpu_saturation.speeds(points[:1]) == []


def test_the_parts_and_the_plot(tmp_path: Path) -> None:
    points = [(float(t), 100_000_000) for t in range(10)] + [(10 + t / 2, 50_000_000) for t in range(20)]
    run = gpu_saturation.Generation([*points, (20.0, 90_000_000), (21.0, 100_000_000)], 10.0, 20.0, 70_000_000)
    lines = gpu_saturation.judge(run).splitlines()
    assert lines[2:] == [
        "| has nothing yet | 1.00 | 100 |",
        "| has its part | 2.00 | 50 |",
        "| has given it back | 1.00 | 95 |",
    ]
    gpu_saturation.draw(run, str(tmp_path / "plot.svg"), "a model")
    assert "<svg" in (tmp_path / "plot.svg").read_text()


# ---------------------------------------------------------------- without a card


def test_without_a_card(tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    hide_gpus(monkeypatch)
    assert gpu.main(["--model", str(tiny_model), "--threads", "1"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("gpu: this build of superllama finds no card")
    assert "bench/run_gpu.sh --computed" in said.err
    assert gpu.main(["--model", "none.gguf"]) == 1
    assert "bench/make_model.py makes one" in capsys.readouterr().err


def test_a_run_on_the_processor(tiny_model: Path) -> None:
    """The program of a turn needs no card itself."""
    runner = gpu_runs.Runner(tiny_model, [8, 16], 3, 1, 16, None, 0, False)
    result = runner.run(runner.spec({"dynamic_layers": True, "async_prefetch": True}, {}))
    assert not result.error
    assert set(result.prompt) == {"8", "16"}
    assert result.decode > 0 < result.first_token_s
    failed = runner.run(runner.spec({"n_gpu_layers": "many"}, {}))
    assert failed.error.startswith("ValidationError: 1 validation error for ModelParams n_gpu_layers")


def test_a_server_in_place_of_a_card(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hide_gpus(monkeypatch)
    monkeypatch.setattr(gpu, "DISK_BYTES", 1 << 20)
    shape = ["--shares", "60", "--host", "100", "--prompts", "16", "--tokens", "2", "--turns", "1", "--ubatch", "16"]
    assert gpu.main(["--model", str(tiny_model), "--server", "1", "--threads", "1", *shape]) == 0
    said = capsys.readouterr()
    assert "RPC server with 1 threads" in said.out
    cells = said.out.splitlines()[-1].split("|")
    assert cells[1].startswith(" 60 %")
    assert all(float(cells[i]) > 0 for i in (7, 8, 9)), said.out  # decoding: stock, ours, ratio
    assert gpu.main(["--model", str(tiny_model), "--server", "1", "--saturation", "x.svg"]) == 1
    assert "needs a card" in capsys.readouterr().err


def test_the_most_that_a_number_was() -> None:
    values = iter([3, 5, 2, 9, 4])
    last = 4

    def read() -> int:
        nonlocal last
        last = next(values, last)
        return last

    with contextlib.closing(Peak(read)) as peak:
        until(lambda: last == 4)
    assert (peak.first, peak.most, peak.rise()) == (3, 9, 6)


def test_memory_is_read_at_some_speed() -> None:
    assert card.ram_speed(1, 8 << 20) > 1e8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--what"], "there is no option --what"),
        (["none.gguf"], "there is no file none.gguf"),
        ([__file__, __file__], "one model at most"),
        (["--out"], "--out names a file"),
        (["--no-tests"], "--computed tries the same on a card that Mesa computes"),
    ],
)
def test_the_script_says_what_is_wrong(arguments: list[str], said: str, tmp_path: Path) -> None:
    here = tmp_path / "bin"
    here.mkdir()
    for tool in ("dirname", "bash"):
        (here / tool).symlink_to(next(p for d in os.environ["PATH"].split(":") if (p := Path(d, tool)).exists()))
    done = subprocess.run([ROOT / "bench/run_gpu.sh", *arguments], capture_output=True, text=True,
                          env={"PATH": f"{here}"}, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1
    assert said in done.stderr


def test_the_script_is_bash() -> None:
    assert subprocess.run(["bash", "-n", ROOT / "bench/run_gpu.sh"]).returncode == 0
