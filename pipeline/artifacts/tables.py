"""Tables that stages exchange: Parquet with a stated schema, the same bytes for the same rows."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow.compute import index_in  # type: ignore[attr-defined]

from pipeline.artifacts.files import BadInput

REMEDY = "Repair it: `tessera verify --deep --repair`, then `dvc repro`"

# Row i of an array in the same payload belongs to row i here. key: the image's name in its shard (9 digits),
# uid: 16 hex digits of the sample's identity (source, url, caption).
ROWS_SCHEMA = pa.schema([("key", pa.string()), ("uid", pa.string())])
# Rows that went in and did not come out. status: one word for the class of failure; reason: what happened.
FAILURES_SCHEMA = pa.schema([*ROWS_SCHEMA, ("status", pa.string()), ("reason", pa.string())])


def write_table(path: Path, table: pa.Table) -> None:
    """Write a table; nothing of the run (index, times) enters the file."""
    pq.write_table(table.replace_schema_metadata(None), path, compression="zstd", store_schema=False)


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """The columns of `schema`, in its order; other columns of the file are left out.

    Raises:
        BadInput: absent, truncated, not Parquet, or a column is missing or of another type.
    """
    try:
        types = {field.name: field.type for field in pq.read_schema(path)}
        wrong = [f"{field.name} ({field.type})" for field in schema if types.get(field.name) != field.type]
        if wrong:
            raise BadInput(path, f"missing or ill-typed columns: {', '.join(wrong)}", REMEDY)
        return pq.read_table(path, columns=schema.names).select(schema.names).replace_schema_metadata(None)
    except FileNotFoundError:
        raise BadInput(path, "no such file", REMEDY) from None
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(path, f"truncated or not Parquet ({error})", REMEDY) from error


def aligned(rows: pa.Table, other: pa.Table, folder: Path | str) -> pa.Table:
    """`rows` with the further columns of `other`, joined by key in the order of `rows`.

    Raises:
        BadInput: `other`, which lies in `folder`, lacks a key, or has another uid for it.
    """
    places = index_in(rows["key"], value_set=other["key"].combine_chunks())
    if places.null_count:
        raise BadInput(folder, f"{places.null_count} rows of the stage after it are missing", "Run `dvc repro`")
    matched = other.take(places)
    if not rows["uid"].equals(matched["uid"]):
        raise BadInput(folder, "its uids are not those of the stage after it", "Run `dvc repro`")
    for name in matched.column_names:
        if name not in rows.column_names:
            rows = rows.append_column(name, matched[name])
    return rows
