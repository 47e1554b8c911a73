"""Which samples name an entity, and where their images lie: what partner images are drawn from, read as it lies.

    offsets.npy      int64 [classes + 1]
    rows.npy         int32 [mentions, 2]: class c is named by rows[offsets[c] : offsets[c + 1]]; each is the shard's
                     position in `shards` and the row among the shard's kept rows, in rising order
    places.npy       `ROW` [kept rows], those of each shard in turn
    vocabulary.json  classes with the number of samples that name each, the shards and the rows that each keeps

Nothing of it is held in memory but what the system caches, once for all processes of a machine.

Source: OVSegmentor card section 3.2.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from random import Random

import numpy as np

from pipeline.artifacts.files import BadInput, CorruptPayload, atomic_json, read_json
from pipeline.artifacts.shards import read_successes
from pipeline.artifacts.tables import aligned
from pipeline.text.entities import Ragged, Vocabulary
from pipeline.text.verdicts import kept

REMEDY = "Repair it: `tessera verify --deep --repair index`, then `dvc repro`"

# Of the image's bytes in the shard's tar, and of the image, px.
_PLACE = {"offset": np.int64, "size": np.uint32, "height": np.uint32, "width": np.uint32}
# uid: the first 32 bits of the sample's.
ROW = np.dtype([*_PLACE.items(), ("uid", np.uint32)])


def places_of(filtered: Path, download: Path | str, shard: str) -> np.ndarray:
    """Where the images of a shard's kept rows lie: `ROW` [rows].

    Args:
        filtered: the filter's payload.
        download: of the images, path or URL; the tar is not read.

    Raises:
        BadInput: the two are of different rows.
    """
    rows = aligned(kept(filtered, "key", "uid"), read_successes(f"{download}/{shard}.parquet"), download)
    places = np.empty(rows.num_rows, ROW)
    for name in _PLACE:
        places[name] = rows[name].to_numpy()
    places["uid"] = [_short(uid) for uid in rows["uid"].to_pylist()]
    return places


def write_index(
    folder: Path,
    vocabulary: Vocabulary,
    shards: Sequence[str],
    entities: Callable[[int], Ragged],
    places: Callable[[int], np.ndarray],
) -> tuple[int, int]:
    """Write the four files; returns kept rows and mentions.

    Two passes, one to count and one to place, so that memory holds one shard however many there are.

    Args:
        entities: classes of each kept row of the shard at a position of `shards`.
        places: where their images lie, see `places_of`.
    """
    counts, lengths = np.zeros(len(vocabulary.classes), dtype=np.int64), []
    for position in range(len(shards)):
        found = entities(position)
        counts += np.bincount(found.values, minlength=len(counts))
        lengths.append(len(found.offsets) - 1)
    offsets = np.concatenate([[0], np.cumsum(counts)])
    np.save(folder / "offsets.npy", offsets)
    _list(folder / "rows.npy", offsets, (entities(position) for position in range(len(shards))))
    lie = _array(folder / "places.npy", ROW, (sum(lengths),))
    for position, first in enumerate(_firsts(lengths)):
        lie[first : first + lengths[position]] = places(position)
    description = {
        "name": vocabulary.name,
        "classes": list(vocabulary.classes),
        "counts": counts.tolist(),
        "shards": list(shards),
        "rows": lengths,
    }
    atomic_json(folder / "vocabulary.json", description)
    return sum(lengths), int(offsets[-1])


def _list(path: Path, offsets: np.ndarray, shards: Iterable[Ragged]) -> None:
    placed = _array(path, np.dtype(np.int32), (int(offsets[-1]), 2))
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


def _array(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """An array in a new file that has its room on the disk: a full one would end whoever writes what is mapped."""
    if not shape[0]:  # cannot be mapped
        np.save(path, empty := np.empty(shape, dtype))
        return empty
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return mapped


def _firsts(lengths: Sequence[int]) -> list[int]:
    """Where the rows of each shard begin."""
    return list(accumulate(lengths, initial=0))[:-1]


def _short(uid: str) -> int:
    return int(uid[:8], 16)


@dataclass(frozen=True, slots=True)
class EntityIndex:
    """An open index; its arrays are mapped, not read. It travels to another process as its folder's name.

    Attributes:
        classes, counts: canonical classes and how many kept rows name each.
        shards: names, to which the first column of `rows` points.
    """

    folder: Path
    classes: tuple[str, ...]
    counts: tuple[int, ...]
    shards: tuple[str, ...]
    _offsets: np.ndarray
    _rows: np.ndarray
    _places: np.ndarray
    _firsts: list[int]

    @classmethod
    def open(cls, folder: Path) -> "EntityIndex":
        """Raises BadInput when a file is absent or torn."""
        about = read_json(folder / "vocabulary.json", REMEDY)
        offsets, rows, places = (_mapped(folder / f"{name}.npy") for name in ("offsets", "rows", "places"))
        if offsets.shape != (len(about["classes"]) + 1,) or rows.shape != (int(offsets[-1]), 2):
            raise BadInput(folder / "rows.npy", f"{rows.shape} does not fit {offsets.shape} offsets", REMEDY)
        if places.dtype != ROW or places.shape != (sum(about["rows"]),):
            raise BadInput(folder / "places.npy", f"{places.shape} where {sum(about['rows'])} rows are kept", REMEDY)
        classes, counts, shards = (tuple(about[name]) for name in ("classes", "counts", "shards"))
        return cls(folder, classes, counts, shards, offsets, rows, places, _firsts(about["rows"]))

    def __reduce__(self) -> tuple[Callable[[Path], "EntityIndex"], tuple[Path]]:
        return EntityIndex.open, (self.folder,)

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

    def place(self, shard: int, row: int) -> tuple[int, int, int, int]:
        """Of a kept row's image: offset and size in the tar of the shard at that position, height and width."""
        found = self._row(shard, row)
        return int(found["offset"]), int(found["size"]), int(found["height"]), int(found["width"])

    def _row(self, shard: int, row: int) -> np.void:
        return self._places[self._firsts[shard] + row]

    def partner(self, entities: Sequence[int], uid: str, rng: Random) -> tuple[int, int, int] | None:
        """A sample that shares one of a sample's entities: an entity that is named, then a sample that names it.

        Both uniform.

        Args:
            uid: of the sample itself, which is drawn only where no other names the entity.

        Returns:
            The entity, the position in `shards` and the row among the shard's kept rows. None where no sample names any
            of the entities.
        """
        named = [entity for entity in entities if len(self.rows(entity))]
        if not named:
            return None
        entity = rng.choice(named)
        found = self.rows(entity)
        number = rng.randrange(len(found))
        shard, row = found[number].tolist()
        if len(found) > 1 and self._row(shard, row)["uid"] == _short(uid):
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
    if len(index._places) != rows:
        raise CorruptPayload(folder / "vocabulary.json", f"{len(index._places)} rows where {rows} are kept")
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
