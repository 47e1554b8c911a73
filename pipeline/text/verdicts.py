"""The table that `filter` writes: rows.parquet, a row per downloaded sample in key order.

Apart from the code that fills it, so that a stage which only asks which rows are kept does not depend on the taggers.
"""

from pathlib import Path

import pyarrow as pa
from pyarrow.compute import equal  # type: ignore[attr-defined]

from pipeline.artifacts.tables import read_table

NAME = "rows.parquet"
KEPT, REJECTED = "kept", "rejected"
# reason: "" for kept rows; entities: classes of the vocabulary; nouns: lower-case singulars.
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("uid", pa.string()),
        ("status", pa.string()),
        ("reason", pa.string()),
        ("nouns", pa.list_(pa.string())),
        ("entities", pa.list_(pa.int16())),
    ]
)


def kept(folder: Path, *columns: str) -> pa.Table:
    """The kept rows of a `filter` payload, in key order: key, uid, nouns, entities, or those of `columns`."""
    wanted = columns or ("key", "uid", "nouns", "entities")
    table = read_table(folder / NAME, pa.schema([SCHEMA.field(name) for name in ("status", *wanted)]))
    return table.filter(equal(table["status"], KEPT)).select(list(wanted))
