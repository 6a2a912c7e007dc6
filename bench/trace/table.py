"""One form for every trace: a Parquet file with t_us, offset, bytes, file (a path or a device), plus what is known.

t_us    int64  microseconds since the start of the run
offset  int64  of the request, in the file (or, for a device trace, on the device)
bytes   int64  its length
file    string the file (or device) that was read
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

REQUIRED = ("t_us", "offset", "bytes", "file")


def make(t_us: Any, offset: Any, n_bytes: Any, file: str, **columns: Any) -> pa.Table:
    t_us = np.asarray(t_us, np.int64)
    data: dict[str, Any] = {"t_us": t_us, "offset": np.asarray(offset, np.int64)}
    data["bytes"] = np.asarray(n_bytes, np.int64)
    data["file"] = pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(t_us), np.int32)), pa.array([file]))
    return pa.table(data | columns)


def save(table: pa.Table, path: Path) -> None:
    pq.write_table(table, path, compression="zstd")


def load(path: Path) -> pa.Table:
    table = pq.read_table(path)
    missing = [name for name in REQUIRED if name not in table.column_names]
    if missing:
        raise ValueError(f"{path} lacks the columns {', '.join(missing)}; a trace has {', '.join(REQUIRED)}")
    return table


def column(table: pa.Table, name: str) -> np.ndarray:
    return table.column(name).to_numpy()
