"""Decisions on downloaded rows: a table in the store, and the small file in git that names it.

data/manifests/decisions.json is `{"table": digest or null, "counts": {...}}`; stage `filter` depends on it. Only rows
with a decision are in the table, sorted by shard and key.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts.files import BadInput, atomic_json, fsync_folder, read_json, sha256_file
from pipeline.artifacts.tables import write_table

FILE = "data/manifests/decisions.json"
SCHEMA = pa.schema([(name, pa.string()) for name in ("shard", "key", "uid", "decision", "of")])
REMEDY = "Run `tessera duplicates` again, or set filter.reject to []"


def write(root: Path, store: Path, tables: Iterable[pa.Table]) -> Path:
    """Write the table, given in parts, and name it; the same rows give the same bytes. Returns its path."""
    rows = pa.concat_tables([SCHEMA.empty_table(), *tables]).sort_by([("shard", "ascending"), ("key", "ascending")])
    folder = store / "decisions"
    folder.mkdir(parents=True, exist_ok=True)
    made = folder / ".made.parquet"
    write_table(made, rows.combine_chunks())
    name = sha256_file(made)
    made.replace(folder / f"{name}.parquet")
    fsync_folder(folder)
    counts = {each["values"]: each["counts"] for each in rows["decision"].value_counts().to_pylist()}
    atomic_json(root / FILE, {"table": name, "counts": counts})
    return folder / f"{name}.parquet"


def find(root: Path, store: Path) -> tuple[str, Path]:
    """Digest and path of the table that `FILE` names.

    Raises:
        BadInput: none is named, or it is gone or changed.
    """
    about = read_json(root / FILE, REMEDY)
    name = about.get("table") if isinstance(about, dict) else None
    if not isinstance(name, str):
        raise BadInput(root / FILE, "names no table of decisions", REMEDY)
    path = store / "decisions" / f"{name}.parquet"
    if not path.is_file() or sha256_file(path) != name:
        raise BadInput(path, "the table of decisions is gone or changed", REMEDY)
    return name, path


def counts(root: Path) -> dict[str, int]:
    """Rows by decision, of the last run of `tessera duplicates`; none where it never ran."""
    path = root / FILE
    return dict(read_json(path, REMEDY).get("counts") or {}) if path.exists() else {}


def of_shard(path: Path, shard: str, uids: Mapping[str, str]) -> dict[str, str]:
    """Decision by key of a shard's rows.

    Args:
        uids: the sample that is now at each key.
    Raises:
        BadInput: the table is torn, or was made of other samples.
    """
    try:
        table = pq.read_table(path, columns=["key", "uid", "decision"], filters=[("shard", "==", shard)])
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(path, f"not a whole Parquet file ({error})", REMEDY) from error
    rows = table.to_pylist()
    for row in rows:
        if uids.get(row["key"], row["uid"]) != row["uid"]:
            problem = f"row {row['key']} of shard {shard} was another sample when these decisions were made"
            raise BadInput(path, problem, REMEDY)
    return {row["key"]: row["decision"] for row in rows}
