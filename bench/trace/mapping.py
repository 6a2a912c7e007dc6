"""From requests on the disk to the file: offset, tensor, layer, expert."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from bench.trace import blkparse, table
from bench.trace.extents import Extents
from bench.trace.tensors import TensorMap


def block_table(requests: list[blkparse.Request], t0: float, extents: Extents, device: str) -> pa.Table:
    """One row per request that reads the file, in order of issue.

    offset        in the file, of its first byte there    bytes       of the file that it reads
    disk_offset   on the disk                             disk_bytes  that it reads in all
    t_us, done_us when it was issued and completed (null: not seen)
    """
    offset = np.array([r.offset for r in requests], np.int64)
    size = np.array([r.n_bytes for r in requests], np.int64)
    index, file_offset, n = extents.to_file(offset, size)
    kept, first = np.unique(index, return_index=True)
    n_bytes = np.bincount(index, weights=n, minlength=len(requests))[kept].astype(np.int64)
    # a request over two extents that meet on the disk alone starts, in the file, where its first piece does
    rows = [requests[i] for i in kept]
    done = [None if r.done is None else round((r.done - t0) * 1e6) for r in rows]
    return table.make(
        [round((r.issued - t0) * 1e6) for r in rows],
        file_offset[first],
        n_bytes,
        device,
        disk_offset=offset[kept],
        disk_bytes=size[kept],
        done_us=pa.array(done, pa.int64()),
        pid=np.array([r.pid for r in rows], np.int32),
        read_ahead=np.array(["A" in r.rwbs for r in rows], bool),
    )


def pieces(requests: pa.Table, where: TensorMap) -> pa.Table:
    """Requests cut at tensor and expert borders: (request, range, layer, expert, bytes)."""
    request, index, n = where.split(table.column(requests, "offset"), table.column(requests, "bytes"))
    return pa.table(
        {
            "request": request.astype(np.int32),
            "range": index.astype(np.int32),
            "layer": where.layers[index],
            "expert": where.experts[index],
            "bytes": n,
        }
    )


def ranges_table(where: TensorMap) -> pa.Table:
    """The model's own layout, for the analysis."""
    return pa.table(
        {
            "range": np.arange(len(where.names), dtype=np.int32),
            "offset": where.starts[:-1],
            "bytes": where.sizes,
            "tensor": where.names,
            "layer": where.layers,
            "expert": where.experts,
        }
    )
