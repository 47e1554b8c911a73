"""Which downloaded rows repeat an earlier one, and which images also stand in a benchmark.

A row has four marks of 64 bits: of its link, of its caption in lower case, of its image's bytes and of its look (dHash:
whether each of 8 x 8 places is darker than its right neighbour). Marks are kept in arrays, 48 bytes a row with the
row's own name; no text is. Near images differ in at most `distance` bits of the look. By pigeonhole such a pair agrees
in one of distance + 1 bands; sorted with that band in front, it lies close together, and `WINDOW` neighbours are
compared, so that time grows with rows alone. A look of nearly one value (plain surfaces) is that of too many pictures
and counts for nothing.

Source of dHash: N. Krawetz, "Kind of Like That" (2013).
"""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Int64, UInt64
from numpy import ndarray
from PIL import Image

from pipeline.artifacts import decisions
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.shards import Shard, decode_rgb, read_successes, uid_numbers
from pipeline.sources.fetching import ROW_DIGITS, SHARD_DIGITS

# The first that applies is a row's decision.
KINDS = ("leak", "image", "near", "url", "caption")
WINDOW = 64  # neighbours in sorted order that are compared
PLAIN = 8  # a look has at least so many bits of either value
IMAGES = (".jpg", ".jpeg", ".png", ".webp")
_SIDE = 8
_TABLE = 1 << 16  # rows whose decisions are text at a time
# px that are decoded at least: of 60 VOC photographs shrunk to 160 x 120, 59 stay within 3 bits (44 at 32 px).
_DRAFT = 128


@dataclass(frozen=True, slots=True)
class Marks:
    """Of some rows, in order: key and uid as numbers, and a mark of each kind, 0 for a look that counts for nothing."""

    key: UInt64[ndarray, " rows"]
    uid: UInt64[ndarray, " rows"]
    url: UInt64[ndarray, " rows"]
    caption: UInt64[ndarray, " rows"]
    image: UInt64[ndarray, " rows"]
    look: UInt64[ndarray, " rows"]


def look(data: bytes, name: str) -> int:
    """dHash of an encoded image; 0 for a plain one. Raises BadInput when it does not decode."""
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            image.draft("L", (_DRAFT, _DRAFT))  # decodes a JPEG at a fraction of its size
            grey = image.convert("L")
    except Exception:  # no JPEG, or a broken one: the careful decoder says which
        grey = Image.fromarray(decode_rgb(data, name)).convert("L")
    small = np.asarray(grey.resize((_SIDE + 1, _SIDE), Image.Resampling.BOX), dtype=np.int16)
    bits = (small[:, :-1] < small[:, 1:]).ravel()
    if not PLAIN <= bits.sum() <= bits.size - PLAIN:
        return 0
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def shard_marks(shard: str, folder: Path) -> Marks:
    """Marks of a shard's successes in key order.

    Raises:
        BadInput: the shard is torn.
    """
    opened, path = Shard.open(folder, shard), folder / f"{shard}.parquet"
    rows = read_successes(path).sort_by("key")
    keys = rows["key"].to_pylist()
    return Marks(
        key=np.array([int(key) for key in keys], dtype=np.uint64),
        uid=uid_numbers(rows["uid"], path),
        url=_hashed(url or "" for url in rows["url"].to_pylist()),
        caption=_hashed((caption or "").lower() for caption in rows["caption"].to_pylist()),
        image=_hashed(sha256 or "" for sha256 in rows["sha256"].to_pylist()),
        look=np.array([look(opened.image_bytes(key), key) for key in keys], dtype=np.uint64),
    )


def _hashed(texts: Iterable[str]) -> UInt64[ndarray, " rows"]:
    """64 bits of each text's SHA-256; 0 for an empty one."""
    found = [
        int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big") if text else 0
        for text in texts
    ]
    return np.array(found, dtype=np.uint64)


def joined(parts: Iterable[Marks], rows: int) -> Marks:
    """The marks of several shards as one; `rows` are there together."""
    whole = Marks(*(np.zeros(rows, np.uint64) for _ in fields(Marks)))
    at = 0
    for part in parts:
        for kind in fields(Marks):
            getattr(whole, kind.name)[at : at + len(part.key)] = getattr(part, kind.name)
        at += len(part.key)
    return whole


def folder_looks(folder: Path) -> tuple[list[str], UInt64[ndarray, " images"]]:
    """Names and looks of all images below a folder. Raises BadInput where there is none."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    if not paths:
        raise BadInput(folder, "no images below it", "Name the folder of a benchmark's test images")
    return [str(path) for path in paths], np.array([look(path.read_bytes(), str(path)) for path in paths], np.uint64)


def decide(
    marks: Marks, distance: int, held_out: tuple[Sequence[str], UInt64[ndarray, " images"]]
) -> Iterator[pa.Table]:
    """Tables in `decisions.SCHEMA` of the rows that repeat an earlier one (`of`: its uid) or are in a benchmark.

    Args:
        distance: bits in which near looks may differ, 0 to 15.
        held_out: names and looks of the benchmarks' images.
    """
    names, looks = held_out
    rules: dict[str, Callable[[], Int64[ndarray, " rows"]]] = {
        "leak": lambda: matches(marks.look, looks, distance),
        "image": lambda: _first_equal(marks.image),
        "near": lambda: _first_near(marks.look, distance),
        "url": lambda: _first_equal(marks.url),
        "caption": lambda: _first_equal(marks.caption),
    }
    kind, of = np.full(len(marks.key), -1, np.int8), np.zeros(len(marks.key), np.int64)
    for number, name in enumerate(KINDS):
        found = rules[name]()
        new = (found >= 0) & (kind < 0)
        kind[new], of[new] = number, found[new]
    rows = np.flatnonzero(kind >= 0)
    for start in range(0, len(rows), _TABLE):
        here = rows[start : start + _TABLE]
        keys = [f"{key:0{SHARD_DIGITS + ROW_DIGITS}d}" for key in marks.key[here].tolist()]
        kinds = [KINDS[number] for number in kind[here].tolist()]
        earlier = [
            names[place] if name == "leak" else f"{marks.uid[place]:016x}"
            for name, place in zip(kinds, of[here].tolist(), strict=True)
        ]
        uids = [f"{uid:016x}" for uid in marks.uid[here].tolist()]
        shards = [key[:SHARD_DIGITS] for key in keys]
        columns = (shards, keys, uids, kinds, earlier)
        yield pa.table(dict(zip(decisions.SCHEMA.names, columns, strict=True)), schema=decisions.SCHEMA)


def _first_equal(marks: UInt64[ndarray, " rows"]) -> Int64[ndarray, " rows"]:
    """The first row with the same mark where it is an earlier one, else -1. Marks of 0 are equal to none."""
    _, first, inverse = np.unique(marks, return_index=True, return_inverse=True)
    found = first[inverse].astype(np.int64)
    return np.where((found < np.arange(len(marks))) & (marks != 0), found, -1)


def _bands(distance: int) -> list[int]:
    """By how many bits to rotate a look, so that each of distance + 1 bands comes in front."""
    return [64 * band // (distance + 1) for band in range(distance + 1)]


def _rotated(looks: UInt64[ndarray, " rows"], bits: int) -> UInt64[ndarray, " rows"]:
    return looks if bits == 0 else (looks << np.uint64(bits)) | (looks >> np.uint64(64 - bits))


def _first_near(looks: UInt64[ndarray, " rows"], distance: int) -> Int64[ndarray, " rows"]:
    """The earliest row found with a near look where it is an earlier one, else -1."""
    rows = np.flatnonzero(looks != 0)
    nearest = np.arange(len(looks), dtype=np.int64)
    for bits in _bands(distance):
        order = rows[np.argsort(_rotated(looks[rows], bits), kind="stable")]
        for step in range(1, min(WINDOW, len(order) - 1) + 1):
            one, two = order[:-step], order[step:]
            close = np.bitwise_count(looks[one] ^ looks[two]) <= distance
            early, late = np.minimum(one, two)[close], np.maximum(one, two)[close]
            np.minimum.at(nearest, late, early)
    return np.where(nearest < np.arange(len(looks)), nearest, -1)


def matches(
    looks: UInt64[ndarray, " rows"], held_out: UInt64[ndarray, " images"], distance: int
) -> Int64[ndarray, " rows"]:
    """For each look the number of a near one among `held_out`, else -1; none within the distance is missed."""
    found = np.full(len(looks), -1, dtype=np.int64)
    known = np.flatnonzero(held_out != 0)
    starts = [*_bands(distance), 64]
    for bits, after in zip(starts[:-1], starts[1:], strict=True):
        front = np.uint64(64 - (after - bits))
        bands = _rotated(looks, bits) >> front
        order = np.argsort(bands, kind="stable")
        ours, theirs = bands[order], _rotated(held_out[known], bits) >> front
        lows, highs = np.searchsorted(ours, theirs), np.searchsorted(ours, theirs, side="right")
        for image, low, high in zip(known.tolist(), lows.tolist(), highs.tolist(), strict=True):
            here = order[low:high]
            here = here[(looks[here] != 0) & (found[here] < 0)]
            found[here[np.bitwise_count(looks[here] ^ held_out[image]) <= distance]] = image
    return found
