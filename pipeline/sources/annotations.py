"""Lists of captioned images, as they are published, read as a stream and cut into slices.

A reader yields `(url, caption, next position)`; a position is a byte offset, a row of a Parquet file or an index, at
which reading can start again. So a slice is two numbers and a digest, a worker reads its own slice, and twelve million
rows need no more memory than twelve. Captions are untrusted: what is not UTF-8 becomes U+FFFD, line breaks spaces.
"""

import csv
import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts.files import BadInput, read_json

Kind = Literal["urls", "flickr8k", "coco_captions"]
Layout = Literal["named", "cc3m", "cc12m"]
Rows = Iterator[tuple[str, str, int]]

_REMEDY = "Set download.annotations (and download.source, layout, url_column, caption_column) to a list that is there"
_FIELD_LIMIT = 1 << 24  # characters of a CSV field; more is a quote that never closes
# Source: CC3M's Train_GCC-training.tsv is caption<TAB>url, CC12M's cc12m.tsv url<TAB>caption, both without a header.
_URL_FIRST = {"cc3m": False, "cc12m": True}


@dataclass(frozen=True, kw_only=True, slots=True)
class Annotations:
    """A list of captioned images.

    Attributes:
        kind: `urls` (a file by its suffix: .parquet, .csv, .tsv, .txt, .jsonl), or a folder of images with a list:
            `flickr8k` (CSV image,caption, a row per caption), `coco_captions` (COCO's captions_*.json).
        layout: how a text file of URLs is laid out; `named` has a header.
        images: the folder of images, where the list names files instead of URLs.
    """

    path: Path
    kind: Kind
    layout: Layout
    url_column: str
    caption_column: str
    images: Path | None


@dataclass(frozen=True, slots=True)
class Slice:
    """Rows of a list that make one shard; `digest` is that of their URLs, captions and file sizes."""

    start: int
    rows: int
    digest: str


def cut(annotations: Annotations, rows_per_slice: int, limit: int | None) -> Iterator[Slice]:
    """Slices of at most that many rows, in the list's order, up to `limit` rows in all.

    Raises:
        BadInput: the list, its columns or the folder of images are not there.
    """
    if annotations.images is not None and not annotations.images.is_dir():
        raise BadInput(annotations.images, "no such folder of images", "Set download.images to the folder")
    rows = islice(read(annotations), limit)
    start = 0
    while True:
        digest, count, after = hashlib.sha256(), 0, start
        for url, caption, position in islice(rows, rows_per_slice):
            record = json.dumps([url, caption, _size(annotations, url)], ensure_ascii=True)
            digest.update(record.encode() + b"\n")
            count, after = count + 1, position
        if not count:
            return
        yield Slice(start, count, digest.hexdigest())
        start = after


def read_slice(annotations: Annotations, part: Slice) -> list[tuple[str, str]]:
    """(url, caption) of a slice's rows."""
    return [(url, caption) for url, caption, _ in islice(read(annotations, part.start), part.rows)]


def read(annotations: Annotations, start: int = 0) -> Rows:
    """Yields (url, caption, position of the next row), from a position on."""
    path = annotations.path
    if not path.is_file():
        raise BadInput(path, "no such list of captioned images", _REMEDY)
    if annotations.kind == "flickr8k":
        return _grouped(_flickr_pairs(path), start)
    if annotations.kind == "coco_captions":
        return _grouped(_coco_pairs(path), start)
    if path.suffix == ".parquet":
        return _parquet_rows(annotations, start)
    if path.suffix == ".jsonl":
        return _jsonl_rows(annotations, start)
    if annotations.layout != "named":
        return _pair_rows(path, _URL_FIRST[annotations.layout], start)
    if path.suffix in {".csv", ".tsv", ".txt"}:
        return _csv_rows(annotations, start)
    raise BadInput(path, f"lists of kind {path.suffix!r} are not read", "Use .parquet, .csv, .tsv, .txt or .jsonl")


def one_line(text: object) -> str:
    """A caption's text on one line; None becomes empty."""
    return "" if text is None else " ".join(_clean(str(text)).replace("\0", " ").split())


def _clean(text: str) -> str:
    """Without the lone surrogates that JSON can spell and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _size(annotations: Annotations, name: str) -> int:
    """Bytes of a folder's image, so that a replaced file makes another slice; -1 for none."""
    if annotations.images is None:
        return -1
    path = annotations.images / name
    return path.stat().st_size if path.is_file() else -1


def _lines(path: Path, start: int) -> Iterator[tuple[str, int]]:
    """Lines without their ends, each with the offset of the next."""
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            start += len(line)
            text = line.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")
            yield text.removeprefix("\ufeff"), start


def _pair_rows(path: Path, url_first: bool, start: int) -> Rows:
    """Two columns parted by the first or last tab, no header, no quotes. A row without a tab has no URL."""
    for line, position in _lines(path, start):
        if url_first:
            url, _, caption = line.partition("\t")
        else:
            caption, _, url = line.rpartition("\t")
        if "\t" not in line:
            url, caption = "", line
        yield url.strip(), one_line(caption), position


class _CountedLines:
    """Lines for csv.reader, which may take several for one record; `position` is the next line's offset."""

    def __init__(self, path: Path, start: int) -> None:
        self._lines, self.position = _lines(path, start), start

    def __iter__(self) -> Iterator[str]:
        for line, position in self._lines:
            self.position = position
            yield line + "\n"


def _csv_records(path: Path, start: int) -> Iterator[tuple[list[str], int]]:
    csv.field_size_limit(_FIELD_LIMIT)
    lines = _CountedLines(path, start)
    records = csv.reader(lines, delimiter="," if path.suffix != ".tsv" else "\t")
    try:
        for record in records:
            if record:
                yield record, lines.position
    except csv.Error as error:
        raise BadInput(
            path, f"not CSV near byte {lines.position} ({error})", "Mend the file: a quote is left open"
        ) from (error)


def _columns(path: Path, known: list[str], wanted: tuple[str, str]) -> tuple[int, int]:
    for name in wanted:
        if name not in known:
            raise BadInput(path, f"no column {name!r}; there are {', '.join(known) or 'none'}", _REMEDY)
    return known.index(wanted[0]), known.index(wanted[1])


def _csv_rows(annotations: Annotations, start: int, wanted: tuple[str, str] | None = None) -> Rows:
    path = annotations.path
    header, first = next(_csv_records(path, 0), ([], 0))
    url, caption = _columns(path, header, wanted or (annotations.url_column, annotations.caption_column))
    for record, position in _csv_records(path, max(start, first)):
        padded = [*record, *[""] * (len(header) - len(record))]
        yield padded[url].strip(), one_line(padded[caption]), position


def _jsonl_rows(annotations: Annotations, start: int) -> Rows:
    """A line that is not a JSON object has no URL."""
    for line, position in _lines(annotations.path, start):
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            record = None
        values = record if isinstance(record, dict) else {}
        yield (
            _clean(str(values.get(annotations.url_column) or "")).strip(),
            one_line(values.get(annotations.caption_column)),
            position,
        )


def _parquet_rows(annotations: Annotations, start: int) -> Rows:
    path, columns = annotations.path, [annotations.url_column, annotations.caption_column]
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise BadInput(path, f"not a whole Parquet file ({error})", _REMEDY) from error
    with file:
        _columns(path, file.schema_arrow.names, (columns[0], columns[1]))
        position, groups = 0, list(range(file.num_row_groups))
        while groups and position + file.metadata.row_group(groups[0]).num_rows <= start:
            position += file.metadata.row_group(groups.pop(0)).num_rows
        for batch in file.iter_batches(batch_size=4096, row_groups=groups, columns=columns):
            if position + batch.num_rows <= start:
                position += batch.num_rows
                continue
            for url, caption in zip(batch.column(columns[0]), batch.column(columns[1]), strict=True):
                position += 1
                if position > start:
                    yield _text(url).strip(), one_line(_text(caption)), position


def _text(value: pa.Scalar) -> str:
    plain = value.as_py()
    if isinstance(plain, bytes):
        return plain.decode("utf-8", "replace")
    return "" if plain is None else str(plain)


def _flickr_pairs(path: Path) -> Iterator[tuple[str, str]]:
    header, first = next(_csv_records(path, 0), ([], 0))
    name, caption = _columns(path, header, ("image", "caption"))
    for record, _ in _csv_records(path, first):
        yield record[name], record[caption] if caption < len(record) else ""


def _coco_pairs(path: Path) -> Iterator[tuple[str, str]]:
    """Source: cocodataset.org/#format-data, "Image Captioning"."""
    values = read_json(path, _REMEDY)
    try:
        names = {image["id"]: image["file_name"] for image in values["images"]}
        pairs = [(names[note["image_id"]], note["caption"]) for note in values["annotations"]]
    except (KeyError, TypeError) as error:
        raise BadInput(path, f"not COCO's captions ({error!r})", _REMEDY) from error
    yield from pairs


def _grouped(pairs: Iterator[tuple[str, str]], start: int) -> Rows:
    """A row per image, in order of first mention, its captions one per line."""
    captions: dict[str, list[str]] = {}
    for name, caption in pairs:
        captions.setdefault(name, []).append(one_line(caption))
    for index, (name, lines) in enumerate(captions.items()):
        if index >= start:
            yield name, "\n".join(lines), index + 1
