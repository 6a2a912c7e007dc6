"""What the library prints to stderr instead of logging it: its parser of grammars does."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import tempfile
import threading
from collections.abc import Iterator

_lock = threading.Lock()  # descriptor 2 is the process's


@contextlib.contextmanager
def printed_to_stderr(marker: bytes) -> Iterator[io.BytesIO]:
    """What C code prints to stderr inside the with block, from the line with the marker on; the object holds it after
    the block. Other threads print there too: what comes before that line, or all if there is none, is printed then.

    Where the process has no stderr, or no folder for temporary files, nothing is held.
    """
    found = io.BytesIO()
    with _lock, contextlib.ExitStack() as stack:
        try:
            if sys.stderr is not None:
                sys.stderr.flush()
            saved = os.dup(2)
            stack.callback(os.close, saved)
            file = stack.enter_context(tempfile.TemporaryFile())
            os.dup2(file.fileno(), 2)
        except (OSError, ValueError):
            yield found
            return
        try:
            yield found
        finally:
            os.dup2(saved, 2)
            file.seek(0)
            text = file.read()
            begin = text.rfind(b"\n", 0, at) + 1 if (at := text.find(marker)) >= 0 else len(text)
            found.write(text[begin:])
            with contextlib.suppress(OSError):
                os.write(2, text[:begin])
