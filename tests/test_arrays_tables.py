"""Tables: schema kept, bytes stable, broken files refused by name."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.tables import FAILURES_SCHEMA, ROWS_SCHEMA, read_table, write_table

TABLE = pa.table({"key": ["000000000", "000000001"], "uid": ["0" * 16, "f" * 16]}, schema=ROWS_SCHEMA)


def test_round_trip_and_same_bytes(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", TABLE)
    write_table(tmp_path / "b.parquet", TABLE.replace_schema_metadata({"made": "today"}))
    assert read_table(tmp_path / "a.parquet", ROWS_SCHEMA).equals(TABLE)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_nested_types_and_extra_columns(tmp_path: Path) -> None:
    schema = pa.schema([("entities", pa.list_(pa.int16())), ("nouns", pa.list_(pa.string()))])
    table = pa.table({"nouns": [["a"], []], "other": [1, 2], "entities": [[1, 2], []]}).cast(
        pa.schema([schema.field("nouns"), ("other", pa.int64()), schema.field("entities")])
    )
    write_table(tmp_path / "a.parquet", table)
    assert read_table(tmp_path / "a.parquet", schema).to_pydict() == {"entities": [[1, 2], []], "nouns": [["a"], []]}


def test_empty_table(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", FAILURES_SCHEMA.empty_table())
    assert read_table(tmp_path / "a.parquet", FAILURES_SCHEMA).num_rows == 0


def test_errors_name_file_and_remedy(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    with pytest.raises(BadInput, match=r"a\.parquet: no such file.*dvc repro"):
        read_table(path, ROWS_SCHEMA)
    write_table(path, TABLE)
    with pytest.raises(BadInput, match=r"a\.parquet: missing or ill-typed columns: status"):
        read_table(path, FAILURES_SCHEMA)
    with pytest.raises(BadInput, match=r"uid \(int32\)"):
        read_table(path, pa.schema([("uid", pa.int32())]))
    for keep in (0, 3, 100, -1):
        pq.write_table(TABLE, path)
        path.write_bytes(path.read_bytes()[:keep])
        with pytest.raises(BadInput, match=r"a\.parquet: truncated or not Parquet"):
            read_table(path, ROWS_SCHEMA)
