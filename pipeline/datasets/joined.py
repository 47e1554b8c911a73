"""One shard of image-caption pairs, joined over the payloads of the stages: download, filter, cached targets.

Tables are joined by key, and the uids on both sides are compared: row i of a mask array belongs to row i here.
"""

from collections import OrderedDict
from dataclasses import dataclass
from mmap import ACCESS_READ, ALLOCATIONGRANULARITY, mmap
from os import SEEK_END
from pathlib import Path
from random import Random
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float16, UInt8
from numpy import ndarray
from pyarrow.compute import index_in, is_in  # type: ignore[attr-defined]

from pipeline.artifacts.arrays import open_array
from pipeline.artifacts.shards import read_successes
from pipeline.artifacts.tables import ROWS_SCHEMA, aligned, read_table
from pipeline.artifacts.vectors import map_vectors
from pipeline.datasets.images import StoredImage
from pipeline.text.verdicts import kept

COLUMNS = ("key", "uid", "caption", "nouns", "entities")
# Of `StoredImage`, in its order.
PLACE = ("offset", "size", "height", "width")


@dataclass(frozen=True, kw_only=True, slots=True)
class PairShard:
    """Payload folders of one shard.

    The images alone may lie in a second store, and are then read where they are.

    Attributes:
        name: five digits.
        download: holds `<name>.tar` and `<name>.parquet`; its path, or its URL in the second store.
        filtered: the filter's payload; its kept rows are used.
        masks: the pseudo-masks' payload, or None; with it only rows that have a mask are used.
        views: the teacher's payload, or None; with it only rows that have views are used.
        groups: the codebook clusters' payload, or None; with it only rows that have them are used.
    """

    name: str
    download: Path | str
    filtered: Path
    masks: Path | None = None
    views: Path | None = None
    groups: Path | None = None

    @property
    def tar(self) -> str:
        """The images: path or URL."""
        return f"{self.download}/{self.name}.tar"

    def successes(self) -> pa.Table:
        """Every row that has an image, in `shards.SCHEMA`; the tar is not read."""
        return read_successes(f"{self.download}/{self.name}.parquet")

    @property
    def cached(self) -> dict[str, Path]:
        """Arrays of cached targets by the name of the sample's field."""
        found = {
            "regions": (self.masks, "masks.zarr"),
            "views": (self.views, "views.zarr"),
            "groups": (self.groups, "masks.zarr"),
        }
        return {field: folder / array for field, (folder, array) in found.items() if folder is not None}


class Sample(NamedTuple):
    """One pair as stored, its image not yet read.

    `captions`: the lines of the row's caption. `entities`: classes of the filter's vocabulary. `regions`: labels over
    the whole image, `groups`: codebook clusters. `views`: unit vectors of the teacher's views of its centre square.
    A tuple: one is made for every image, and sent to a worker, in a fraction of a dataclass's time.
    """

    uid: str
    captions: list[str]
    nouns: list[str]
    entities: list[int]
    image: StoredImage
    regions: UInt8[ndarray, "grid_h grid_w"] | None = None
    views: Float16[ndarray, "views dim"] | None = None
    groups: UInt8[ndarray, "grid_h grid_w"] | None = None

    def caption(self, rng: Random) -> str:
        """One of the captions."""
        return rng.choice(self.captions)

    def __str__(self) -> str:
        return f"sample {self.uid} ({self.image})"


def count_rows(shard: PairShard) -> int:
    """Rows that can be trained on."""
    return _usable(shard).num_rows


def captions(shard: PairShard) -> list[str]:
    """Every line of the captions of the shard's kept rows; the tar is not read."""
    rows = shard.successes()
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
    """The joined tables of shards; the `limit` that were used last stay open.

    To join a shard takes 30 ms for 10,000 rows, and longer from a second store; a block is a small part of them. So
    every joined table is kept in `file`, which is empty at first: about 100 bytes a row and its caption.
    """

    def __init__(self, limit: int, file: IO[bytes]) -> None:
        self._limit, self._file = limit, file
        self._open: OrderedDict[str, Table] = OrderedDict()
        self._kept: dict[str, tuple[int, int]] = {}

    def get(self, shard: PairShard) -> "Table":
        """The shard's table, joined at its first use."""
        if shard.name not in self._open:
            self._open[shard.name] = Table(shard, self._joined(shard))
        self._open.move_to_end(shard.name)
        while len(self._open) > self._limit:
            self._open.popitem(last=False)
        return self._open[shard.name]

    def _joined(self, shard: PairShard) -> pa.Table:
        if shard.name not in self._kept:
            table = join(shard)
            start = self._file.seek(0, SEEK_END)
            start = self._file.seek(start + -start % ALLOCATIONGRANULARITY)
            with pa.ipc.new_file(self._file, table.schema) as writer:
                writer.write_table(table)
            self._file.flush()
            self._kept[shard.name] = start, self._file.tell() - start
        start, length = self._kept[shard.name]
        mapped = mmap(self._file.fileno(), length, access=ACCESS_READ, offset=start)
        return pa.ipc.open_file(pa.py_buffer(mapped)).read_all()


def join(shard: PairShard) -> pa.Table:
    """A shard's rows: kept by the filter, downloaded, and with every cached target asked for; joined by key.

    Columns: key, uid, caption, nouns, entities; offset and size of the image in the tar, bytes; and by the name of each
    target, where the row stands in its array.

    Raises:
        BadInput: a key is absent from one of the payloads, or their uids differ.
    """
    rows = aligned(_usable(shard), kept(shard.filtered), shard.filtered)
    for field, path in shard.cached.items():
        table = _array_rows(path)
        rows = aligned(rows, table, path.parent)
        rows = rows.append_column(field, index_in(rows["key"], value_set=table["key"].combine_chunks()))
    rows = aligned(rows, shard.successes(), shard.download)
    return rows.select([*COLUMNS, *PLACE, *shard.cached]).combine_chunks()


class Table:
    """One shard's rows, `joined`, with its cached targets open."""

    def __init__(self, shard: PairShard, joined: pa.Table) -> None:
        self._tar, self._rows = shard.tar, joined
        readers = {"views": map_vectors}
        self._arrays: dict[str, Any] = {
            field: readers.get(field, open_array)(path) for field, path in shard.cached.items()
        }

    def slice(self, start: int, rows: int) -> "Rows":
        """Neighbouring rows, with their cached targets in memory."""
        part = self._rows.slice(start, rows)
        targets = {field: self._read(field, part[field].to_numpy()) for field in self._arrays}
        columns = {name: part[name].to_pylist() for name in (*COLUMNS, *PLACE)}
        places = zip(*(columns[name] for name in ("key", *PLACE)), strict=True)
        images = [StoredImage(self._tar, f"{key}.jpg", *place) for key, *place in places]
        return Rows(images, columns, targets)

    def _read(self, field: str, places: ndarray) -> ndarray:
        first = int(places.min())
        return np.asarray(self._arrays[field][first : int(places.max()) + 1])[places - first]


@dataclass(frozen=True, slots=True)
class Rows:
    """A block in memory, all but the pixels."""

    images: list[StoredImage]
    columns: dict[str, list]
    targets: dict[str, ndarray]

    def row(self, row: int) -> Sample:
        """One of its rows."""
        uid, caption, nouns, entities = (self.columns[name][row] for name in ("uid", "caption", "nouns", "entities"))
        targets = {field: array[row] for field, array in self.targets.items()}
        return Sample(uid, caption.splitlines() or [""], nouns, entities, self.images[row], **targets)
