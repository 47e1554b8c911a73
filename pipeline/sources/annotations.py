"""Lists of captioned images, as they are published, read as a stream and cut into slices.

A slice is two numbers and a digest, a worker reads its own slice, and twelve million rows need no more memory than
twelve. Formats of one file are in `tables`, those of many in `redcaps`, `prebuilt` and, at a URL, `buckets`; what a row
is, in `rows`.
"""

import errno
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

from pipeline.artifacts.files import BadInput, read_json
from pipeline.artifacts.shards import make_uid
from pipeline.sources import buckets, prebuilt, redcaps, tables
from pipeline.sources.rows import REMEDY, Row, Rows, one_line

Kind = Literal["urls", "flickr8k", "coco_captions", "redcaps", "yfcc15m", "shards"]
Layout = Literal["named", "cc3m", "cc12m"]

# Source: CC3M's Train_GCC-training.tsv is caption<TAB>url, CC12M's cc12m.tsv url<TAB>caption, both without a header.
_URL_FIRST = {"cc3m": False, "cc12m": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotations:
    """A list of captioned images.

    Attributes:
        kind: `urls` (a file by its suffix: .parquet, .csv, .tsv, .txt, .jsonl); `redcaps` (a folder or zip of JSON
            files); `yfcc15m` (the Parquet file that `yfcc15m.joined` makes); `shards` (a folder of tars, or a text file
            that names them); or a folder of images with a list: `flickr8k` (CSV image,caption, a row per caption),
            `coco_captions` (COCO's captions_*.json).
        layout: how a text file of URLs is laid out; `named` has a header.
        caption_column: of `named` lists and Parquet; RedCaps' `caption` or `raw_caption`.
        images: the folder of images or shards, where the list names files instead of URLs.
        weight: the share of its rows that is taken, (0, 1].
        bucket: URL of a folder of shards that is not on this machine; `path` is then what `buckets.listed` makes.
    """

    path: Path
    kind: Kind
    layout: Layout
    url_column: str
    caption_column: str
    images: Path | None
    weight: float
    bucket: str = ""


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of a list that make one shard; `digest` is that of their URLs, captions, file sizes and rejections."""

    start: int
    rows: int
    digest: str


def cut(annotations: Annotations, rows_per_slice: int, limit: int | None) -> Iterator[Slice]:
    """Slices of at most that many rows, in the list's order, of its first `limit` rows.

    Raises:
        BadInput: the list, its columns or the folder of images are not there; or no row is.
    """
    if annotations.images is not None and not annotations.images.is_dir():
        raise BadInput(annotations.images, "no such folder of images", "Set download.images to the folder")
    rows = _taken(islice(read(annotations), limit), annotations.weight)
    start = 0
    while True:
        digest, count, after = hashlib.sha256(), 0, start
        for row in _hashed(annotations, islice(rows, rows_per_slice), digest):
            count, after = count + 1, row.position
        if not count and not start:
            problem = "no rows in it" if annotations.weight == 1 else f"no rows in the share {annotations.weight} of it"
            raise BadInput(annotations.path, problem, REMEDY)
        if not count:
            return
        yield Slice(start, count, digest.hexdigest())
        start = after


def read_slice(annotations: Annotations, part: Slice) -> list[Row]:
    """A slice's rows.

    Raises:
        BadInput: they are no longer those that it was cut from, and its shard's key would name others.
    """
    digest, rows = hashlib.sha256(), _taken(read(annotations, part.start), annotations.weight)
    found = list(_hashed(annotations, islice(rows, part.rows), digest))
    if digest.hexdigest() != part.digest:
        raise BadInput(annotations.path, "it, or a file that it names, changed since the stage began", "Run it again")
    return found


def read(annotations: Annotations, start: int = 0) -> Rows:
    """Yields rows from a position on."""
    path, wanted = annotations.path, (annotations.url_column, annotations.caption_column)
    if annotations.kind == "redcaps":
        return redcaps.read(path, annotations.caption_column, start)
    if annotations.bucket:
        return buckets.read(path, start)
    if annotations.kind == "shards":
        assert annotations.images is not None
        return prebuilt.read(path, annotations.images, wanted, start)
    if not path.is_file():
        raise BadInput(path, "no such list of captioned images", REMEDY)
    if annotations.kind == "yfcc15m":
        return tables.parquet_rows(path, ("url", "caption"), start, "rejected")
    if annotations.kind == "flickr8k":
        return _grouped(_flickr_pairs(path), start)
    if annotations.kind == "coco_captions":
        return _grouped(_coco_pairs(path), start)
    if path.suffix == ".parquet":
        return tables.parquet_rows(path, wanted, start)
    if path.suffix == ".jsonl":
        return tables.jsonl_rows(path, wanted, start)
    if path.suffix not in {".csv", ".tsv", ".txt"}:
        raise BadInput(path, f"lists of kind {path.suffix!r} are not read", "Use .parquet, .csv, .tsv, .txt or .jsonl")
    if annotations.layout != "named":
        return tables.pair_rows(path, _URL_FIRST[annotations.layout], start)
    return tables.csv_rows(path, wanted, start)


def _taken(rows: Rows, weight: float) -> Rows:
    """That share of the rows, by the place between 0 and 1 that a hash gives each of them."""
    return (
        rows if weight == 1 else (row for row in rows if int(make_uid("", row.url, row.caption), 16) < weight * 2**64)
    )


def _hashed(annotations: Annotations, rows: Rows, digest: "hashlib._Hash") -> Rows:
    """The rows, as they come; what decides their shard's bytes goes into `digest`."""
    for row in rows:
        digest.update(json.dumps(_identity(annotations, row), ensure_ascii=True).encode() + b"\n")
        yield row


def _identity(annotations: Annotations, row: Row) -> list[str | int]:
    """What of a row decides its shard's bytes: link, caption, size of its image; why it is rejected, its given name."""
    extra = [row.rejected, row.uid] if row.rejected or row.uid else []
    return [row.url, row.caption, row.size if row.image else _size(annotations, row.url), *extra]


def _size(annotations: Annotations, name: str) -> int:
    """Bytes of a folder's image, so that a replaced file makes another slice; -1 for none."""
    if annotations.images is None:
        return -1
    path = annotations.images / name
    try:
        return path.stat().st_size if path.is_file() else -1
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        return -1


def _flickr_pairs(path: Path) -> Iterator[tuple[str, str]]:
    header, first = next(tables.csv_records(path, 0), ([], 0))
    name, caption = tables.columns(path, header, ("image", "caption"))
    for record, _ in tables.csv_records(path, first):
        padded = [*record, *[""] * (len(header) - len(record))]
        yield padded[name], padded[caption]


def _coco_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Source: cocodataset.org/#format-data, "Image Captioning"."""
    values = read_json(path, REMEDY)
    try:
        names = {image["id"]: image["file_name"] for image in values["images"]}
        pairs = [(names[note["image_id"]], note["caption"]) for note in values["annotations"]]
        if strange := [name for name, _ in pairs if not isinstance(name, str)]:
            raise TypeError(f"file_name {strange[0]!r}")
    except (KeyError, TypeError) as error:
        raise BadInput(path, f"not COCO's captions ({error!r})", REMEDY) from error
    yield from pairs


def _grouped(pairs: Iterator[tuple[str, str]], start: int) -> Rows:
    """A row per image, in order of first mention, its captions one per line."""
    captions: dict[str, list[str]] = {}
    for name, caption in pairs:
        captions.setdefault(name, []).append(one_line(caption))
    for index, (name, lines) in enumerate(captions.items()):
        if index >= start:
            yield Row(name, "\n".join(lines), index + 1)
