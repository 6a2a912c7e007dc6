import pytest
from bench.analysis import Results
from bench.trace import table, tensors
from bench_helpers import write_model, write_run

KB = 1024
# (start of a request that follows one of bytes 0-999, category)
CASES = [
    (1000, "0"),
    (1001, "< 128 KB"),
    (1000 + 128 * KB - 1, "< 128 KB"),
    (1000 + 128 * KB, "< 1 MB"),
    (1000 + 1024 * KB - 1, "< 1 MB"),
    (1000 + 1024 * KB, ">= 1 MB"),
    (999, "backward"),
    (0, "backward"),
]


@pytest.mark.parametrize(("start", "kind"), CASES)
def test_category(tmp_path, start, kind):
    rows = table.make([0, 5], [0, start], [1000, 10], "m", disk_offset=[0, 1000], disk_bytes=[1000, 10],
                      done_us=[3, 9])  # fmt: skip
    write_model(tmp_path, tensors.from_ranges([(0, 4 << 20, "blk.0.x", 0, -1)], 4 << 20))
    write_run(tmp_path, "one", rows)
    found = {r["space"]: r["kind"] for r in Results(tmp_path).query("gaps")}
    assert found == {"logical": kind, "physical": "0"}


def test_runs_do_not_follow_each_other(tmp_path):
    write_model(tmp_path, tensors.from_ranges([(0, 4096, "blk.0.x", 0, -1)], 4096))
    for key in ("a", "b"):
        write_run(tmp_path, key, table.make([0], [0], [10], "m", disk_offset=[0], disk_bytes=[10], done_us=[1]))
    assert Results(tmp_path).query("gaps") == []


def test_every_query_runs_without_traces(tmp_path):
    """A machine without root has counters at most."""
    from bench.analysis import SQL

    write_model(tmp_path, tensors.from_ranges([(0, 4096, "blk.0.x", 0, -1)], 4096))
    write_run(tmp_path, "one")
    results = Results(tmp_path)
    for path in SQL.glob("*.sql"):
        if path.stem != "macros":
            results.query(path.stem)
    assert results.query("speed")[0]["tokens_per_s"] == 4.0


def test_no_results(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run; make one with"):
        Results(tmp_path)
