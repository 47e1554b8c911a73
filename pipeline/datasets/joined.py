"""One shard of image-caption pairs, joined over the payloads of the stages: download, filter, cached targets.

Tables are joined by key, and the uids on both sides are compared: row i of a mask array belongs to row i here.
"""

from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, UInt8
from numpy import ndarray
from pyarrow.compute import equal, index_in, is_in  # type: ignore[attr-defined]

from pipeline.artifacts.arrays import open_array
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.shards import SUCCESS, Shard, decode_rgb, index_tar, read_rows
from pipeline.artifacts.tables import ROWS_SCHEMA, read_table
from pipeline.artifacts.vectors import map_vectors
from pipeline.text.verdicts import kept


@dataclass(frozen=True, kw_only=True, slots=True)
class PairShard:
    """Payload folders of one shard.

    Attributes:
        name: five digits.
        download: holds `<name>.tar` and `<name>.parquet`.
        filtered: the filter's payload; its kept rows are used.
        masks: the pseudo-masks' payload, or None; with it only rows that have a mask are used.
        views: the teacher's payload, or None; with it only rows that have views are used.
        groups: the codebook clusters' payload, or None; with it only rows that have them are used.
    """

    name: str
    download: Path
    filtered: Path
    masks: Path | None = None
    views: Path | None = None
    groups: Path | None = None

    @property
    def cached(self) -> dict[str, Path]:
        """Arrays of cached targets by the name of the sample's field."""
        found = {
            "regions": (self.masks, "masks.zarr"),
            "views": (self.views, "views.zarr"),
            "groups": (self.groups, "masks.zarr"),
        }
        return {field: folder / array for field, (folder, array) in found.items() if folder is not None}


@dataclass(frozen=True, slots=True)
class Sample:
    """One pair as stored.

    `captions`: the lines of the row's caption. `entities`: classes of the filter's vocabulary. `regions`: labels over
    the whole image, `groups`: codebook clusters. `views`: unit vectors of the teacher's views of its centre square.
    """

    uid: str
    captions: list[str]
    nouns: list[str]
    entities: list[int]
    image: UInt8[ndarray, "height width 3"]
    regions: UInt8[ndarray, "grid_h grid_w"] | None = None
    views: Float16[ndarray, "views dim"] | None = None
    groups: UInt8[ndarray, "grid_h grid_w"] | None = None

    def caption(self, rng: np.random.Generator) -> str:
        """One of the captions."""
        return self.captions[int(rng.integers(len(self.captions)))]


def count_rows(shard: PairShard) -> int:
    """Rows that can be trained on."""
    return _usable(shard).num_rows


def captions(shard: PairShard) -> list[str]:
    """Every line of the captions of the shard's kept rows; the tar is not read."""
    rows = read_rows(shard.download / f"{shard.name}.parquet")
    wanted = rows.filter(is_in(rows["uid"], value_set=kept(shard.filtered)["uid"].combine_chunks()))
    return [line for caption in wanted["caption"].to_pylist() for line in caption.splitlines()]


def _usable(shard: PairShard) -> pa.Table:
    """Key and uid of the rows that have every cached target asked for; of all kept rows where none is."""
    first, *others = [_array_rows(path) for path in shard.cached.values()] or [kept(shard.filtered, "key", "uid")]
    for other in others:
        first = first.filter(is_in(first["key"], value_set=other["key"].combine_chunks()))
    return first


def _array_rows(array: Path) -> pa.Table:
    return read_table(array.parent / "rows.parquet", ROWS_SCHEMA)


class Tables:
    """The joined tables of the shards used last."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._open: OrderedDict[str, Table] = OrderedDict()

    def get(self, shard: PairShard) -> "Table":
        """The shard's table, read when it is not there."""
        if shard.name not in self._open:
            self._open[shard.name] = Table(shard)
        self._open.move_to_end(shard.name)
        while len(self._open) > self._limit:
            self._open.popitem(last=False)
        return self._open[shard.name]


class Table:
    """One shard's rows: kept by the filter, downloaded, and with every cached target asked for; joined by key.

    Raises:
        BadInput: a key is absent from one of the payloads, or their uids differ.
    """

    def __init__(self, shard: PairShard) -> None:
        self._path = shard.download / f"{shard.name}.tar"
        self._index = index_tar(self._path)
        rows = _aligned(_usable(shard), kept(shard.filtered), shard.filtered)
        readers = {"views": map_vectors}
        self._arrays: dict[str, Any] = {
            field: readers.get(field, open_array)(path) for field, path in shard.cached.items()
        }
        # Where each row stands in each array.
        self._places: dict[str, ndarray] = {}
        for field, path in shard.cached.items():
            table = _array_rows(path)
            rows = _aligned(rows, table, path.parent)
            self._places[field] = index_in(rows["key"], value_set=table["key"].combine_chunks()).to_numpy()
        self._rows = _aligned(rows, _successes(shard), shard.download)

    def slice(self, start: int, rows: int) -> "Rows":
        """Neighbouring rows, with their cached targets in memory."""
        part = self._rows.slice(start, rows)
        targets = {field: self._read(field, start, rows) for field in self._arrays}
        # A shard of these rows only: blocks outlive the table, and an index has three entries for every row of it.
        index = {f"{key}.jpg": self._index[f"{key}.jpg"] for key in part["key"].to_pylist()}
        shard = Shard(self._path, part, index)
        columns = {name: part[name].to_pylist() for name in ("key", "uid", "caption", "nouns", "entities")}
        return Rows(shard, columns, targets)

    def _read(self, field: str, start: int, rows: int) -> ndarray:
        places = self._places[field][start : start + rows]
        first = int(places.min())
        return np.asarray(self._arrays[field][first : int(places.max()) + 1])[places - first]


def _successes(shard: PairShard) -> pa.Table:
    rows = read_rows(shard.download / f"{shard.name}.parquet")
    return rows.filter(equal(rows["status"], SUCCESS)).select(["key", "uid", "caption"])


def _aligned(rows: pa.Table, other: pa.Table, folder: Path) -> pa.Table:
    """`rows` with the further columns of `other`, joined by key in the order of `rows`."""
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


@dataclass(frozen=True, slots=True)
class Rows:
    """A block in memory, all but the pixels."""

    shard: Shard
    columns: dict[str, list]
    targets: dict[str, ndarray]

    @property
    def uids(self) -> list[str]:
        """Stable sample names."""
        return self.columns["uid"]

    def sample(self, row: int) -> Sample:
        """The row with its image decoded. Raises BadInput when that fails."""
        values = {name: column[row] for name, column in self.columns.items()}
        key = values["key"]
        return Sample(
            uid=values["uid"],
            captions=values["caption"].splitlines() or [""],
            nouns=values["nouns"],
            entities=values["entities"],
            image=decode_rgb(self.shard.image_bytes(key), f"{self.shard.path}:{key}.jpg"),
            **{field: array[row] for field, array in self.targets.items()},
        )
