"""Partner images: that of another sample that shares an entity with this one.

Partners lie anywhere in the set: the index of entities says where each lies, and each picture is one read.

Source: OVSegmentor card section 3.2.
Deviates: the released code draws ten partners per row offline, among rows with the same raw word, the row itself
included; here a partner is drawn anew at each visit among the rows of the canonical class, and is the row itself only
where no other names the entity.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from pipeline.artifacts.files import BadInput
from pipeline.datasets.images import StoredImage
from pipeline.datasets.joined import PairShard, Sample
from pipeline.text.index import EntityIndex


@dataclass(frozen=True, slots=True)
class Partner:
    """The shared entity (class of the vocabulary), the image, and where it stands: shard's position, kept row."""

    entity: int
    image: StoredImage
    place: tuple[int, int]


class Partners:
    """Draws partners; one object serves all threads of a loader, and travels to a worker process.

    Raises:
        BadInput: the index is torn, or names a shard that is not among `shards`.
    """

    def __init__(self, shards: Sequence[PairShard], index: Path) -> None:
        self.index = EntityIndex.open(index)
        tars = {shard.name: shard.tar for shard in shards}
        absent = [name for name in self.index.shards if name not in tars]
        if absent:
            raise BadInput(index, f"names shard {absent[0]}, which is not there", "Run `dvc repro filter`")
        self._tars = [tars[name] for name in self.index.shards]

    def draw(self, sample: Sample, rng: Random) -> Partner | None:
        """A partner, or None where no sample names any of the sample's entities; see `EntityIndex.partner`."""
        found = self.index.partner(sample.entities, sample.uid, rng)
        if found is None:
            return None
        entity, shard, row = found
        image = StoredImage(self._tars[shard], f"partner row {row}", *self.index.place(shard, row))
        return Partner(entity, image, (shard, row))
