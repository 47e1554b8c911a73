"""Partner images: another sample that shares an entity with this one, its picture read straight from its shard's tar.

Partners lie anywhere in the set, so nothing is read ahead: 16 bytes per kept row of every shard that was asked for stay
in memory (offset and size in the tar, and a part of the uid), and each picture is one read.

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
from jaxtyping import UInt8
from numpy import ndarray

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.shards import decode_stored, read_member
from pipeline.artifacts.urls import Unreachable
from pipeline.datasets.joined import PairShard, Sample, aligned
from pipeline.text.index import EntityIndex
from pipeline.text.verdicts import kept

# Pictures that do not decode are passed over this often before the sample goes without a partner.
ATTEMPTS = 3
_PLACE = np.dtype([("offset", np.int64), ("size", np.uint32), ("uid", np.uint32)])


@dataclass(frozen=True, slots=True)
class Partner:
    """The shared entity (class of the vocabulary), the picture, and where it stands: shard's position, kept row."""

    entity: int
    image: UInt8[ndarray, "height width 3"]
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
        """A partner, or None for a sample without an entity or when no drawn picture decodes.

        Raises:
            Unreachable: a second store cannot be read; another partner would be another result.
        """
        for _ in range(ATTEMPTS):
            found = self.place(sample, rng)
            if found is None:
                return None
            entity, shard, row = found
            try:
                return Partner(entity, self._image(shard, row), (shard, row))
            except Unreachable:
                raise
            except BadInput:
                continue
        return None

    def place(self, sample: Sample, rng: Random) -> tuple[int, int, int] | None:
        """Entity, shard's position and kept row, see `EntityIndex.partner`; the sample's own row has its uid."""
        uid = _short(sample.uid)
        return self.index.partner(sample.entities, lambda shard, row: self._table(shard)["uid"][row] == uid, rng)

    def _image(self, shard: int, row: int) -> UInt8[ndarray, "height width 3"]:
        place = self._table(shard)[row]
        tar = self._shards[shard].tar
        data = read_member(tar, (int(place["offset"]), int(place["size"])), f"partner row {row}")
        return decode_stored(data, f"{tar}: partner row {row}")

    def _table(self, shard: int) -> ndarray:
        """Places of the shard's kept rows, read at the first use."""
        with self._locks[shard]:
            if shard not in self._places:
                self._places[shard] = _places(self._shards[shard])
            return self._places[shard]


def _places(shard: PairShard) -> ndarray:
    rows = aligned(kept(shard.filtered, "key", "uid"), shard.successes(), shard.download)
    places = np.empty(rows.num_rows, _PLACE)
    places["offset"], places["size"] = rows["offset"].to_numpy(), rows["size"].to_numpy()
    places["uid"] = [_short(uid) for uid in rows["uid"].to_pylist()]
    return places


def _short(uid: str) -> int:
    return int(uid[:8], 16)
