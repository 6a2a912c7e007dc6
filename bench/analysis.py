"""The results of a study as tables in DuckDB, and the queries of sql/ over them."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import pyarrow as pa

SQL = Path(__file__).with_name("sql")

# columns of run.json that queries name: without a tracer some are null, and then they still need a type
_RUN_COLUMNS = {
    "run": pa.string(), "model_name": pa.string(), "model": pa.string(), "engine": pa.string(), "scenario": pa.string(),
    "swappiness": pa.int64(), "read_ahead_kb": pa.int64(), "threads": pa.int64(), "tokens": pa.int64(),
    "repeat": pa.int64(), "status": pa.string(), "error": pa.string(), "pressure_method": pa.string(),
    "model_bytes": pa.int64(), "budget_bytes": pa.int64(), "limit_bytes": pa.int64(), "peak_bytes": pa.int64(),
    "oom_kills": pa.int64(), "wall_s": pa.float64(), "load_s": pa.float64(), "prompt_s": pa.float64(),
    "decode_s": pa.float64(), "decode_tokens_per_s": pa.float64(), "prompt_tokens_per_s": pa.float64(),
    "first_token_s": pa.float64(), "hash": pa.string(), "decode_read_bytes": pa.float64(), "block_reads": pa.int64(),
    "block_bytes": pa.int64(), "block_requeued_bytes": pa.int64(), "trace_lost": pa.int64(),
    **{f"total_{name}": pa.float64() for name in (
        "read_bytes", "disk_read_bytes", "major_faults", "minor_faults", "cpu_user_s", "cpu_system_s", "group_refaults",
        "psi_memory_full_us", "psi_memory_some_us", "psi_io_full_us", "psi_io_some_us", "sampler_cpu_s")},
}  # fmt: skip

# files of a run, with the columns that the queries use: an empty table where no run has the file
_FILES = {
    "block": "row_number BIGINT, t_us BIGINT, \"offset\" BIGINT, bytes BIGINT, disk_offset BIGINT, disk_bytes BIGINT, "
             "done_us BIGINT, pid INTEGER, read_ahead BOOLEAN",
    "block_pieces": "request INTEGER, \"range\" INTEGER, layer INTEGER, expert INTEGER, bytes BIGINT",
    "reader": "t_us BIGINT, \"offset\" BIGINT, bytes BIGINT, file VARCHAR",
    "reader_pieces": "request INTEGER, \"range\" INTEGER, layer INTEGER, expert INTEGER, bytes BIGINT",
    "counters": "t_us DOUBLE, read_bytes DOUBLE",
    "residency": "t_us BIGINT, layer INTEGER, cached_bytes DOUBLE, bytes DOUBLE",
}  # fmt: skip


class Results:
    """A folder that run_experiment.py wrote."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = sorted(folder.glob("runs/*/run.json"))
        if not files:
            raise FileNotFoundError(
                f"{folder} holds no finished run; make one with bench/run_experiment.py --out {folder}"
            )
        self.runs = [json.loads(f.read_text()) | {"run": f.parent.name} for f in files]
        for run in self.runs:
            run["model_name"] = Path(run["model"]).stem
        self.db = duckdb.connect()
        rows = {name: pa.array([r.get(name) for r in self.runs], kind) for name, kind in _RUN_COLUMNS.items()}
        self.db.register("runs_plain", pa.table(rows))
        self._tables()
        self.db.execute(
            "CREATE VIEW runs AS SELECT *, model_name IN (SELECT model_name FROM ranges WHERE expert >= 0) AS moe "
            "FROM runs_plain"
        )
        self.db.execute((SQL / "macros.sql").read_text())

    def _tables(self) -> None:
        for name, columns in _FILES.items():
            pattern = self.folder / "runs" / "*" / f"{name}.parquet"
            if any(self.folder.glob(f"runs/*/{name}.parquet")):
                self.db.execute(
                    f"CREATE VIEW {name} AS SELECT * EXCLUDE (filename, file_row_number), "
                    f"file_row_number AS row_number, parse_filename(parse_dirpath(filename)) AS run FROM "
                    f"read_parquet('{pattern}', filename = true, "
                    "file_row_number = true, union_by_name = true)"
                )
            else:
                self.db.execute(f"CREATE TABLE {name} (run VARCHAR, {columns})")
        models = self.folder / "models" / "*.parquet"
        self.db.execute(
            "CREATE VIEW ranges AS SELECT * EXCLUDE (filename), parse_filename(filename, true) AS model_name "
            f"FROM read_parquet('{models}', filename = true)"
        )

    def query(self, name: str) -> list[dict]:
        """Rows of sql/NAME.sql."""
        cursor = self.db.execute((SQL / f"{name}.sql").read_text())
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]

    def disk_speed(self, model: str) -> float | None:
        """Bytes per second of this disk, the best of the study's own measurements of this model's file."""
        path = self.folder / "disk_speed.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return max((x["bytes_per_s"] for x in lines if x["model"] == model), default=None)

    def machine(self) -> dict:
        path = self.folder / "machine.json"
        return json.loads(path.read_text()) if path.exists() else {}
