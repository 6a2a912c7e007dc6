from pathlib import Path

import pytest
from bench.trace import blkparse, mapping, reader, table, tensors
from bench.trace.extents import from_list

DATA = Path(__file__).with_name("data")


def test_blkparse_text():
    out = blkparse.parse((DATA / "blkparse-recorded.txt").read_text().splitlines(), "8,0")
    assert [(r.offset // 512, r.n_bytes, r.rwbs) for r in out.reads] == [
        (223490, 4096, "RA"),
        (223498, 524288, "R"),
        (300000, 131072, "R"),
    ]
    assert [r.done for r in out.reads] == [0.0001, 0.0009, None]
    assert out.reads[1].issued == 0.00012  # the issue before was refused by the device
    assert out.requeued_bytes == 524288


def test_tracefs_text():
    """Recorded: dd with O_DIRECT over a file of two extents, the second lower on the disk."""
    out = blkparse.parse((DATA / "tracefs-recorded.txt").read_text().splitlines())
    assert len(out.reads) == 12
    assert {r.n_bytes for r in out.reads} == {524288}
    assert all(0 < r.done - r.issued < 0.01 for r in out.reads)
    extents = from_list([(0, 60317696 * 512, 4 << 20), (4 << 20, 60309504 * 512, 2 << 20)])
    rows = mapping.block_table(out.reads, out.reads[0].issued, extents, "vda")
    assert table.column(rows, "offset").tolist() == [i * 524288 for i in range(12)]
    assert table.column(rows, "t_us")[0] == 0


def test_lost_events():
    assert blkparse.lost_events(["entries: 4", "overrun: 3", "dropped events: 2"]) == 5
    assert blkparse.lost_events((DATA / "blkparse-recorded.txt").read_text().splitlines()) == 0


def test_requests_are_cut_at_experts():
    where = tensors.from_ranges(
        [(100, 200, "blk.0.attn_q.weight", 0, -1), (200, 300, "blk.0.ffn_up_exps.weight", 0, 0),
         (300, 400, "blk.0.ffn_up_exps.weight", 0, 1), (420, 500, "output.weight", -1, -1)], 500)  # fmt: skip
    pieces = mapping.pieces(table.make([0, 1], [150, 390], [200, 1000], "m"), where).to_pydict()
    assert pieces["request"] == [0, 0, 0, 1, 1, 1]
    assert pieces["expert"] == [-1, 0, 1, 1, -1, -1]
    assert pieces["bytes"] == [50, 100, 50, 10, 20, 80]
    assert where.expert_ranges(0, 1) == [(300, 100)]


def test_reader_trace(tmp_path):
    path = tmp_path / "t.txt"
    path.write_text(f"{reader.HEADER}\nfile 0 /a b/m.gguf\n10 4096 100 0\n20 0 50 0\n30 17")
    out = reader.read(path)  # the last line was cut by a kill
    assert out.to_pydict() == {"t_us": [10, 20], "offset": [4096, 0], "bytes": [100, 50], "file": ["/a b/m.gguf"] * 2}
    path.write_text(f"{reader.HEADER}\nnonsense\n1 2 3 0\n")
    with pytest.raises(ValueError, match=":2: 'nonsense'"):
        reader.read(path)
