"""What the payloads of the caching stages share: names of arrays, numerics, and the check of rows against counts."""

from pathlib import Path
from typing import Literal

from pipeline.artifacts.files import CorruptPayload
from pipeline.artifacts.tables import FAILURES_SCHEMA, ROWS_SCHEMA, read_table
from pipeline.engine import Counts

FEATURES = "features.zarr"  # vectors [rows, tokens, dim], see pipeline.artifacts.vectors
MASKS = "masks.zarr"  # uint8 [rows, grid_h, grid_w]
Precision = Literal["float32", "bfloat16"]


def check_rows(folder: Path, counts: Counts, array_rows: int) -> None:
    """Hold the tables against the counts and the array.

    Raises:
        CorruptPayload: rows are missing, repeated, out of order, or both done and failed.
    """
    done = read_table(folder / "rows.parquet", ROWS_SCHEMA)["key"].to_pylist()
    failed: list[str] = []
    if (folder / "failures.parquet").exists() or counts.failed:
        failed = read_table(folder / "failures.parquet", FAILURES_SCHEMA)["key"].to_pylist()
    if (len(done), len(failed)) != (counts.rows, counts.failed) or array_rows != counts.rows:
        found = f"{len(done)} rows and {len(failed)} failures, {array_rows} rows of the array"
        raise CorruptPayload(folder, f"{found}, where {counts.rows} and {counts.failed} were counted")
    if done != sorted(set(done)) or set(done) & set(failed):
        raise CorruptPayload(folder / "rows.parquet", "keys are not in order, or repeat")
