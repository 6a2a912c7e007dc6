"""B: what the disk gives when a file is read as our engine reads it: O_DIRECT, some threads, large blocks, into memory
that is more than the processor's caches hold, as a ring of streamed weights is.

Used as a program too: bench/disk_speed.py FILE [--threads 6] [--block 4MiB] [--bytes 2GB]
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import page_cache
from bench.sizes import format_size, parse_size

HUGE_PAGE = 2 << 20
MEMORY = 64 << 20  # what the blocks are read into, one after the other


@dataclass(frozen=True)
class DiskSpeed:
    bytes_per_s: float
    n_bytes: int
    seconds: float
    threads: int
    block_bytes: int
    direct: bool  # False: the filesystem refused O_DIRECT; read through the page cache, dropped behind

    def to_dict(self) -> dict:
        return asdict(self)


def measure(path: Path, threads: int = 6, block: int = 4 << 20, n_bytes: int | None = None) -> DiskSpeed:
    """Read the first n_bytes (default: all) once, blocks handed out in order. Buffered pages are evicted before."""
    size = path.stat().st_size
    total = min(size, n_bytes or size) // block * block or min(size, block)
    page_cache.evict(path)
    direct = True
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        direct, fd = False, os.open(path, os.O_RDONLY)
    lock, at, done, failed = threading.Lock(), 0, 0, []
    n_buffers = max(threads, MEMORY // block)
    memory = mmap.mmap(-1, n_buffers * block + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)  # as our engine's memory is: requests with fewer pieces
    buffers = memoryview(memory)

    def work() -> None:
        nonlocal at, done
        try:
            while True:
                with lock:
                    offset, at = at, at + block
                if offset >= total:
                    return
                to = offset % (n_buffers * block)
                n = os.preadv(fd, [buffers[to : to + block]], offset)  # without the interpreter's lock
                if not direct:
                    os.posix_fadvise(fd, offset, n, os.POSIX_FADV_DONTNEED)
                with lock:
                    done += n
        except OSError as error:
            failed.append(error)

    start = time.perf_counter()
    workers = [threading.Thread(target=work) for _ in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seconds = time.perf_counter() - start
    os.close(fd)
    if failed:
        raise RuntimeError(f"reading {path} failed: {failed[0]}; check the disk, or give another model file")
    return DiskSpeed(done / seconds, done, seconds, threads, block, direct)


def note(log: Path, path: Path, **about: str) -> DiskSpeed:
    """Measure and add a line to a file of measurements, with what there is to say about it."""
    speed = measure(path)
    with log.open("a") as out:
        out.write(json.dumps({"model": path.stem, **about, **speed.to_dict()}) + "\n")
    page_cache.evict(path)
    return speed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--threads", type=int, default=6)
    parser.add_argument("--block", type=parse_size, default=4 << 20)
    parser.add_argument("--bytes", type=parse_size)
    a = parser.parse_args()
    speed = measure(a.file, a.threads, a.block, a.bytes)
    how = "O_DIRECT" if speed.direct else "buffered: O_DIRECT was refused"
    print(f"{format_size(speed.bytes_per_s)}/s ({format_size(speed.n_bytes)} in {speed.seconds:.2f} s, "
          f"{speed.threads} threads x {format_size(speed.block_bytes)}, {how})")  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
