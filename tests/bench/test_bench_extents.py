import shutil
import subprocess

import numpy as np
import pytest
from bench import device
from bench.analysis import Results
from bench.trace import blkparse, block, mapping, tensors
from bench.trace.extents import from_list, read_extents
from bench.undo import Journal
from bench_fragment import CHUNK, fragmented
from bench_helpers import needs_root, write_model, write_run
from hypothesis import given
from hypothesis import strategies as st

KNOWN = from_list([(0, 8000, 1000), (1000, 2000, 500), (1500, 2500, 500), (3000, 9000, 1000)])


def test_neighbours_merge():
    assert len(KNOWN) == 3  # 1000 and 1500 are contiguous in the file and on the disk; 3000 follows a hole


@pytest.mark.parametrize(
    ("disk", "size", "expected"),
    [
        (8000, 100, [(0, 100)]),
        (2400, 200, [(1400, 200)]),
        (7900, 300, [(0, 200)]),  # starts before the file's extent
        (8900, 200, [(900, 100), (3000, 100)]),  # over two extents that touch on the disk only
        (5000, 100, []),  # another file's
        (0, 20000, [(1000, 1000), (0, 1000), (3000, 1000)]),  # in the disk's order
    ],
)
def test_known_requests(disk, size, expected):
    _, offset, n = KNOWN.to_file(np.array([disk]), np.array([size]))
    assert list(zip(offset.tolist(), n.tolist(), strict=True)) == expected


def test_many_requests_keep_their_index():
    index, offset, _ = KNOWN.to_file(np.array([5000, 2000, 8900]), np.array([10, 10, 200]))
    assert index.tolist() == [1, 2, 2]
    assert offset.tolist() == [1000, 900, 3000]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.randoms())
def test_there_and_back(lengths, random):
    order = list(range(len(lengths)))
    random.shuffle(order)
    physical, at = {}, 7
    for i in order:
        physical[i] = at
        at += lengths[i] + random.randrange(3)
    starts = np.cumsum([0, *lengths])
    extents = from_list([(int(starts[i]), physical[i], n) for i, n in enumerate(lengths)])
    for byte in range(int(starts[-1])):
        disk = extents.to_disk(byte)
        _, offset, n = extents.to_file(np.array([disk]), np.array([1]))
        assert (offset.tolist(), n.tolist()) == ([byte], [1])
    assert extents.to_disk(int(starts[-1])) == -1


@pytest.fixture
def pieces(tmp_path):
    """A really fragmented file, with its extents."""
    disk = device.disk_of(tmp_path)
    if disk is None:
        pytest.skip("the temporary folder's filesystem has no block device")
    try:
        path = fragmented(tmp_path / "pieces")
        found = read_extents(path, disk.start)
    except OSError as error:
        pytest.skip(f"this filesystem cannot cut a file into pieces: {error}")
    if len(found) < 10:
        pytest.skip(f"the filesystem made only {len(found)} extents")
    return path, disk, found


def test_fiemap_agrees_with_filefrag(pieces):
    path, disk, found = pieces
    if shutil.which("filefrag") is None:
        pytest.skip("no filefrag")
    text = subprocess.run(["filefrag", "-b1", "-v", str(path)], capture_output=True, text=True).stdout
    rows = []
    for line in text.splitlines():
        cells = [c.strip() for c in line.split(":")]
        if cells[0].isdigit():
            logical, physical = (int(c.split("..")[0]) for c in cells[1:3])
            rows.append((logical, physical + disk.start * 512, int(cells[3])))
    assert np.array_equal(from_list(rows).physical, found.physical)
    assert found.length.sum() == path.stat().st_size


def shares(tmp_path, found, requests, size):
    """Gap categories of the requests, from the SQL that the report uses."""
    where = tensors.from_ranges([(0, size, "blk.0.x", 0, -1)], size)
    write_model(tmp_path / "r", where)
    rows = mapping.block_table(requests, 0.0, found, "disk")
    write_run(tmp_path / "r", "one", rows, model_bytes=size)
    return rows, {(r["space"], r["kind"]): r["share"] for r in Results(tmp_path / "r").query("gaps")}


def test_jumps_are_physical_only(tmp_path, pieces):
    """The file read from start to end, as requests of its extents: sequential in the file, jumping on the disk."""
    path, _, found = pieces
    requests = []
    for physical, length in zip(found.physical, found.length, strict=True):
        for at in range(int(physical), int(physical + length), CHUNK):
            requests.append(blkparse.Request(len(requests) / 1000, None, at, CHUNK, 1, "R"))
    rows, share = shares(tmp_path, found, requests, path.stat().st_size)
    assert share[("logical", "0")] == 1.0
    assert share[("physical", "0")] < 0.6
    assert share[("physical", "backward")] > 0
    assert rows.column("bytes").to_numpy().sum() == path.stat().st_size


@needs_root()
def test_jumps_of_a_real_trace(tmp_path, pieces):
    path, disk, found = pieces
    tool, why = block.available("tracefs")
    if tool is None:
        pytest.skip(why)
    with Journal() as journal:
        tracer = block.tracer("tracefs", journal, disk, found)
        try:
            tracer.start()
            command = ["dd", f"if={path}", "of=/dev/null", f"bs={CHUNK}", "iflag=direct", "status=none"]
            if subprocess.run(command).returncode:
                pytest.skip("the filesystem refuses O_DIRECT")
            traced = tracer.stop()
        finally:
            tracer.close()
    rows, share = shares(tmp_path, found, traced.reads, path.stat().st_size)
    assert rows.column("bytes").to_numpy().sum() == path.stat().st_size
    issued, done = (rows.column(name).to_pylist() for name in ("t_us", "done_us"))
    assert all(d is not None and d >= i for i, d in zip(issued, done, strict=True))  # of this file; others may read on
    assert share[("logical", "0")] > 0.9  # what else was merged into a request may be cut off, nothing more
    assert share[("physical", "0")] < 0.6
    assert not any(name.startswith("tracefs") for name in (p.name for p in journal.path.parent.iterdir()))
