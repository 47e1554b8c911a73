"""Which samples name an entity: the lists that partner images are drawn from, read from disk as they lie.

    offsets.npy      int64 [classes + 1]
    rows.npy         int32 [mentions, 2]: class c is named by rows[offsets[c] : offsets[c + 1]]; each is the shard's
                     position in `shards` and the row among the shard's kept rows, in rising order
    vocabulary.json  classes with the number of samples that name each, the shards and the rows they keep

Source: OVSegmentor card section 3.2.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np

from pipeline.artifacts.files import BadInput, CorruptPayload, atomic_json, read_json
from pipeline.text.entities import Ragged, Vocabulary

REMEDY = "Repair it: `tessera verify --deep --repair index`, then `dvc repro`"


def write_index(
    folder: Path, vocabulary: Vocabulary, shards: Sequence[str], entities: Callable[[int], Ragged]
) -> tuple[int, int]:
    """Write the three files; returns kept rows and mentions.

    Two passes, one to count and one to place, so that memory holds one shard however many there are.

    Args:
        entities: classes of each kept row of the shard at a position of `shards`.
    """
    counts, rows = np.zeros(len(vocabulary.classes), dtype=np.int64), 0
    for position in range(len(shards)):
        found = entities(position)
        counts += np.bincount(found.values, minlength=len(counts))
        rows += len(found.offsets) - 1
    offsets = np.concatenate([[0], np.cumsum(counts)])
    np.save(folder / "offsets.npy", offsets)
    _place(folder / "rows.npy", offsets, (entities(position) for position in range(len(shards))))
    description = {
        "name": vocabulary.name,
        "classes": list(vocabulary.classes),
        "counts": counts.tolist(),
        "shards": list(shards),
        "rows": rows,
    }
    atomic_json(folder / "vocabulary.json", description)
    return rows, int(offsets[-1])


def _place(path: Path, offsets: np.ndarray, shards: Iterable[Ragged]) -> None:
    total = int(offsets[-1])
    if not total:
        np.save(path, np.zeros((0, 2), dtype=np.int32))
        return
    placed = np.lib.format.open_memmap(path, mode="w+", dtype=np.int32, shape=(total, 2))
    cursor = offsets[:-1].copy()
    for position, found in enumerate(shards):
        row = np.repeat(np.arange(len(found.offsets) - 1), np.diff(found.offsets))
        order = np.argsort(found.values, kind="stable")
        counts = np.bincount(found.values, minlength=len(cursor))
        ends = np.cumsum(counts)
        for number in np.flatnonzero(counts):
            to = slice(cursor[number], cursor[number] + counts[number])
            placed[to, 0] = position
            placed[to, 1] = row[order[ends[number] - counts[number] : ends[number]]]
        cursor += counts
    placed.flush()


@dataclass(frozen=True, slots=True)
class EntityIndex:
    """An open index; its arrays are mapped, not read.

    Attributes:
        classes, counts: canonical classes and how many kept rows name each.
        shards: names, to which the first column of `rows` points.
    """

    classes: tuple[str, ...]
    counts: tuple[int, ...]
    shards: tuple[str, ...]
    _offsets: np.ndarray
    _rows: np.ndarray

    @classmethod
    def open(cls, folder: Path) -> "EntityIndex":
        """Raises BadInput when a file is absent or torn."""
        about = read_json(folder / "vocabulary.json", REMEDY)
        offsets, rows = _mapped(folder / "offsets.npy"), _mapped(folder / "rows.npy")
        if offsets.shape != (len(about["classes"]) + 1,) or rows.shape != (int(offsets[-1]), 2):
            raise BadInput(folder / "rows.npy", f"{rows.shape} does not fit {offsets.shape} offsets", REMEDY)
        return cls(tuple(about["classes"]), tuple(about["counts"]), tuple(about["shards"]), offsets, rows)

    def rows(self, entity: str | int) -> np.ndarray:
        """Samples that name the class: position in `shards` and row among the kept, int32 [samples, 2].

        Raises:
            KeyError: no class of that name.
        """
        if isinstance(entity, str):
            if entity not in self.classes:
                raise KeyError(f"{entity!r} is not a class of the vocabulary")
            entity = self.classes.index(entity)
        return self._rows[self._offsets[entity] : self._offsets[entity + 1]]

    def partner(
        self, entities: Sequence[int], own: Callable[[int, int], bool], rng: Random
    ) -> tuple[int, int, int] | None:
        """A sample that shares one of a sample's entities: an entity that is named, then a sample that names it.

        Both uniform.

        Args:
            own: whether a place is that of the sample itself, which is drawn only where no other names the entity.

        Returns:
            The entity and the place: position in `shards`, row among the shard's kept rows. None where no sample names
            any of the entities.
        """
        named = [entity for entity in entities if len(self.rows(entity))]
        if not named:
            return None
        entity = rng.choice(named)
        found = self.rows(entity)
        number = rng.randrange(len(found))
        shard, row = found[number].tolist()
        if len(found) > 1 and own(shard, row):
            # One of the others: each then has the same chance, whether or not this row was drawn first.
            number = (number + 1 + rng.randrange(len(found) - 1)) % len(found)
            shard, row = found[number].tolist()
        return entity, shard, row


def check_index(folder: Path, rows: int) -> None:
    """Read an index back. Raises CorruptPayload when lists are out of order or counts do not add up."""
    try:
        index = EntityIndex.open(folder)
    except BadInput as error:
        raise CorruptPayload(folder, str(error)) from error
    about = read_json(folder / "vocabulary.json", REMEDY)
    if about["rows"] != rows:
        raise CorruptPayload(folder / "vocabulary.json", f"{about['rows']} rows where {rows} are kept")
    for number, count in enumerate(index.counts):
        found = index.rows(number)
        if len(found) != count or (len(found) and not 0 <= found[:, 0].min() <= found[:, 0].max() < len(index.shards)):
            raise CorruptPayload(folder / "rows.npy", f"the list of {index.classes[number]!r} is not whole")


def _mapped(path: Path) -> np.ndarray:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise BadInput(path, "no such file", REMEDY) from None
    except (ValueError, OSError) as error:
        raise BadInput(path, f"truncated or not a .npy file ({error})", REMEDY) from error
