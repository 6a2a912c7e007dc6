"""The trace that our own reader writes: every read of weights, exact, on every system.

A text file, made by the run itself when SUPERLLAMA_READER_TRACE (or --reader-trace) names it:

    # superllama-reader-trace 1
    file 0 /path/of/the/model.gguf
    1523 4096 16777216 0        <- t_us since the start of the process, file offset, bytes, file index
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from bench.trace import table

ENV = "SUPERLLAMA_READER_TRACE"
HEADER = "# superllama-reader-trace 1"


def read(path: Path) -> pa.Table:
    lines = path.read_text().splitlines()
    if not lines or lines[0] != HEADER:
        raise ValueError(f"{path}: the first line must be '{HEADER}'; was it written by another version?")
    files: dict[int, str] = {}
    rows: list[tuple[int, ...]] = []
    for number, line in enumerate(lines[1:], 2):
        words = line.split(maxsplit=2) if line.startswith("file ") else line.split()
        try:
            if words and words[0] == "file":
                files[int(words[1])] = words[2]
            elif words:
                t_us, offset, n_bytes, file = (int(w) for w in words)
                rows.append((t_us, offset, n_bytes, file))
        except (ValueError, IndexError):
            if number == len(lines):
                break  # the last line of a run that was killed
            raise ValueError(f"{path}:{number}: '{line}' is not 't_us offset bytes file'") from None
    columns = [[row[i] for row in rows] for i in range(4)]
    out = table.make(*columns[:3], "")
    names = pa.array([files.get(i, str(i)) for i in columns[3]], pa.string())
    return out.set_column(out.column_names.index("file"), "file", names)
