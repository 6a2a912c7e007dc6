import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench import page_cache, programs
from bench.cgroup import find_root
from bench.pressure import pressure, start_locker, total_memory
from bench.undo import Journal, start_time
from bench_helpers import needs_program, needs_root

ALLOCATE = "import sys; b = bytearray(int(sys.argv[1])); b[::4096] = b'x' * len(b[::4096])"


def needs_cgroup():
    return pytest.mark.skipif(find_root() is None, reason="no writable memory cgroup")


@needs_cgroup()
@pytest.mark.parametrize(("size", "killed"), [(20 << 20, 0), (200 << 20, 1)])
def test_limit_holds(size, killed):
    with Journal() as journal, pressure(journal, 100 << 20) as p:
        child = subprocess.run([sys.executable, "-c", ALLOCATE, str(size)], preexec_fn=p.enter)
        assert (child.returncode != 0) == bool(killed)
        assert p.oom_kills() == killed
        assert min(size, 100 << 20) * 0.9 < p.peak() <= 100 << 20
        path = p.group.path
    assert not path.exists()


@needs_program("mem_locker")
def test_locker_refuses_to_lock_past_the_reserve():
    command = [str(programs.find("mem_locker")), str(total_memory()), str(1 << 30)]
    with pytest.raises(RuntimeError, match=r"got 0 B of .* possible\): more than is available beyond the reserve"):
        start_locker(command)


@needs_root()
@needs_program("mem_locker")
def test_locker_locks_and_releases():
    with Journal() as journal, pressure(journal, total_memory() - (2 << 30), "locker", 1 << 30) as p:
        assert p.locked == pytest.approx(1 << 30, rel=0.01)
        pid = journal.entries[-1]["pid"]
        text = Path(f"/proc/{pid}/status").read_text()
        assert int(text.split("VmLck:")[1].split()[0]) * 1024 == p.locked
    assert start_time(pid) is None


@needs_program("mem_locker")
def test_locker_dies_with_its_parent():
    code = (
        "import subprocess, sys, os, signal\n"
        "c = subprocess.Popen([sys.argv[1], '1000000', '1000'], stdin=subprocess.PIPE, stdout=subprocess.PIPE)\n"
        "c.stdout.readline(); print(c.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(programs.find("mem_locker"))], capture_output=True, text=True
    )
    pid = int(done.stdout)
    for _ in range(100):
        if start_time(pid) is None:
            return
        time.sleep(0.05)
    pytest.fail("the locker outlived its parent")


def test_evict_and_residency(tmp_path):
    path = tmp_path / "f"
    path.write_bytes(bytes(8 << 20))
    with page_cache.Residency(path) as residency:
        page_cache.evict(path)
        assert residency.pages().mean() < 0.1
        path.read_bytes()
        if residency.pages().mean() < 1:
            pytest.skip("this filesystem does not keep the file cached")
        if residency.cached_bytes() is not None:
            assert residency.cached_bytes() == 8 << 20
        page_cache.evict(path)
        assert residency.pages().mean() < 0.1
