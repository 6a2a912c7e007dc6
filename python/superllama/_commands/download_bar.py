"""A bar that follows files while they grow, for downloads that somebody else makes."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def download_bar(folder: Path, title: str, pattern: str = "*", total: int | None = None) -> Iterator[None]:
    """Show the size of the largest file below `folder` that fits the pattern; nothing if stderr is no terminal.
    `total` is about what it will be, None where nobody knows."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=total)
        done = threading.Event()

        def follow() -> None:
            while not done.wait(0.2):
                with contextlib.suppress(OSError):  # files get other names
                    size = max((p.stat().st_size for p in folder.rglob(pattern) if p.is_file()), default=0)
                    bar.update(task, completed=size if total is None else min(size, total))

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
