"""Partner images: that of another sample that shares an entity with this one.

Partners lie anywhere in the set: 24 bytes per kept row of every shard that was asked for stay in memory (where its
image lies in the tar, its height and width, and a part of the uid), and each picture is one read.

Source: OVSegmentor card section 3.2.
Deviates: the released code draws ten partners per row offline, among rows with the same raw word, the row itself
included; here a partner is drawn anew at each visit among the rows of the canonical class, and is the row itself only
where no other names the entity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from threading import Lock

import numpy as np
from numpy import ndarray

from pipeline.artifacts.files import BadInput
from pipeline.datasets.images import StoredImage
from pipeline.datasets.joined import PLACE, PairShard, Sample, aligned
from pipeline.text.index import EntityIndex
from pipeline.text.verdicts import kept

_ROW = np.dtype([*((name, np.int64 if name == "offset" else np.uint32) for name in PLACE), ("uid", np.uint32)])


@dataclass(frozen=True, slots=True)
class Partner:
    """The shared entity (class of the vocabulary), the image, and where it stands: shard's position, kept row."""

    entity: int
    image: StoredImage
    place: tuple[int, int]


class Partners:
    """Draws partners; one object serves all threads of a loader, and travels to a worker process without its tables.

    Raises:
        BadInput: the index is torn, or names a shard that is not among `shards`.
    """

    def __init__(self, shards: Sequence[PairShard], index: Path) -> None:
        self.index = EntityIndex.open(index)
        by_name = {shard.name: shard for shard in shards}
        absent = [name for name in self.index.shards if name not in by_name]
        if absent:
            raise BadInput(index, f"names shard {absent[0]}, which is not there", "Run `dvc repro filter`")
        self._shards = [by_name[name] for name in self.index.shards]
        self._made_of = (shards, index)
        self._places: dict[int, ndarray] = {}
        self._locks = [Lock() for _ in self._shards]

    def __reduce__(self) -> tuple[type, tuple[Sequence[PairShard], Path]]:
        return type(self), self._made_of

    def draw(self, sample: Sample, rng: Random) -> Partner | None:
        """A partner, or None where no sample names any of the sample's entities."""
        found = self.place(sample, rng)
        if found is None:
            return None
        entity, shard, row = found
        values = self._table(shard)[row]
        place = (int(values[name]) for name in PLACE)
        return Partner(entity, StoredImage(self._shards[shard].tar, f"partner row {row}", *place), (shard, row))

    def place(self, sample: Sample, rng: Random) -> tuple[int, int, int] | None:
        """Entity, shard's position and kept row, see `EntityIndex.partner`; the sample's own row has its uid."""
        uid = _short(sample.uid)
        return self.index.partner(sample.entities, lambda shard, row: self._table(shard)["uid"][row] == uid, rng)

    def _table(self, shard: int) -> ndarray:
        """Places of the shard's kept rows, read at the first use."""
        with self._locks[shard]:
            if shard not in self._places:
                self._places[shard] = _places(self._shards[shard])
            return self._places[shard]


def _places(shard: PairShard) -> ndarray:
    rows = aligned(kept(shard.filtered, "key", "uid"), shard.successes(), shard.download)
    places = np.empty(rows.num_rows, _ROW)
    for name in PLACE:
        places[name] = rows[name].to_numpy()
    places["uid"] = [_short(uid) for uid in rows["uid"].to_pylist()]
    return places


def _short(uid: str) -> int:
    return int(uid[:8], 16)
