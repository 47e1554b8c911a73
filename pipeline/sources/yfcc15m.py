"""YFCC15M: OpenAI's list of 14.8M photos, joined to Yahoo's metadata of YFCC100M by photo id.

Source: openai/CLIP, data/yfcc100m.md, for the list (line number, photo id, photo hash; no header); the dataset's own
README for the metadata: one file with 25 columns, or formerly ten parts of 10M lines without line number and hash, text
fields URL-encoded. The caption rule is GroupViT's (card groupvit.md 7; create_subset.py, convert_yfcc14m.py): the
description, URL-unquoted, without tags, `+` as blank; fewer than two words are dropped, here as rejected rows.
Deviates: words are counted after blanks are folded; the release takes an empty description's blank for two words.

A compressed text cannot be read from its middle, so the join is made once, in one pass, as a Parquet file that slices
are read from. Ids are a sorted array: 15M of them take 0.12 GB, and one bit more each for those that were found.
"""

import array
import bz2
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Int64

from pipeline.artifacts.files import BadInput, digest
from pipeline.sources.rows import Row, one_line

SUBSET, METADATA = "yfcc100m_subset_data.tsv", "yfcc100m_dataset"
CAPTIONS, LINKS = ("description", "title"), ("s3", "download_url")
MIN_WORDS = 2
SCHEMA = pa.schema([("url", pa.string()), ("caption", pa.string()), ("rejected", pa.string())])

# The README asks for the copy at multimediacommons.org instead of millions of requests to Flickr; it still has photos
# that are gone there, and it is what GroupViT's release was made from. A hash is not padded: it may be shorter than 32.
_S3 = "https://multimedia-commons.s3-us-west-2.amazonaws.com/data/images/{0:.3}/{1}/{0}.jpg"
_LINES = 50_000  # lines of metadata in memory, about 30 MB
_TAG = re.compile("<.*?>")
_REMEDY = (
    f"Set download.annotations to a folder with OpenAI's {SUBSET} (or .bz2) and Yahoo's {METADATA}.bz2, unpacked or "
    f"not, or its parts {METADATA}-0.bz2 to -9.bz2"
)


class _Columns(NamedTuple):
    """Where a metadata line has what; the older form has no hash."""

    photo: int
    hash: int | None
    title: int
    description: int
    download_url: int
    is_video: int


_FORMS = {25: _Columns(1, 2, 8, 9, 16, 24), 23: _Columns(0, None, 6, 7, 14, 22)}


def joined(folder: Path, link: str, caption: str, lists: Path) -> Path:
    """The joined list of a folder, made if `lists` does not have it: url, caption, rejected; a row per listed photo.

    Args:
        link: `s3` (Multimedia Commons' copy) or `download_url` (Flickr's address in the metadata).
        caption: `description` or `title`.
    Raises:
        BadInput: a file is not there, cut off, or not of the official form.
    """
    for key, value, known in (("url_column", link, LINKS), ("caption_column", caption, CAPTIONS)):
        if value not in known:
            raise BadInput(folder, f"YFCC100M has no {value!r}", f"Set download.{key} to {' or '.join(known)}")
    subset, metadata = _one_of(folder, SUBSET), _metadata(folder)
    stats = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in (subset, *metadata)]
    target = lists / f"yfcc15m-{digest([link, caption, stats])[:16]}.parquet"
    if not target.exists():
        print(f"joining {subset} with {len(metadata)} files of metadata, once", file=sys.stderr)
        lists.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
                for rows in join(subset, metadata, link, caption):
                    values = [{"url": row.url, "caption": row.caption, "rejected": row.rejected} for row in rows]
                    writer.write_table(pa.Table.from_pylist(values, SCHEMA))
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    return target


def join(subset: Path, metadata: list[Path], link: str, caption: str) -> Iterator[list[Row]]:
    """Batches of rows in the metadata's order, and at last the photos that it does not have."""
    wanted = _photo_ids(subset)
    found = np.zeros(len(wanted), bool)
    for path in metadata:
        for lines, columns in _batches(path):
            if link == "s3" and columns.hash is None:
                problem, remedy = "no hashes in this form of the metadata", f"Use {METADATA}.bz2, or set "
                raise BadInput(path, problem, remedy + "download.url_column to download_url")
            ids = np.fromiter((_photo_id(line, columns.photo) for line in lines), np.int64, len(lines))
            places = np.searchsorted(wanted, ids)
            rows = []
            for number in np.flatnonzero(wanted[np.minimum(places, len(wanted) - 1)] == ids).tolist():
                row = _row(lines[number], columns, link, caption)
                rows.append(row._replace(rejected="twice in the metadata") if found[places[number]] else row)
                found[places[number]] = True
            yield rows
    missing = wanted[~found]
    for start in range(0, len(missing), _LINES):
        yield [Row(f"flickr:{photo}", "", 0, "no metadata") for photo in missing[start : start + _LINES].tolist()]


def clean_caption(field: str) -> str:
    """A URL-encoded field as a caption; see the module's docstring."""
    return one_line(_TAG.sub("", unquote(field)).replace("+", " "))


def _row(line: bytes, columns: _Columns, link: str, caption: str) -> Row:
    fields = line.decode("utf-8", "replace").rstrip("\r\n").split("\t")
    if _FORMS.get(len(fields)) != columns:
        return Row(f"flickr:{fields[columns.photo]}", "", 0, f"{len(fields)} columns of metadata")
    text = clean_caption(fields[columns.description if caption == "description" else columns.title])
    url = fields[columns.download_url]
    if link == "s3" and columns.hash is not None:
        hashed = fields[columns.hash]
        url = _S3.format(hashed, hashed[3:6])
    rejected = ""
    if fields[columns.is_video] == "1":
        rejected = "a video"
    elif len(text.split()) < MIN_WORDS:
        rejected = f"fewer than {MIN_WORDS} words in the {caption}"
    return Row(url, text, 0, rejected)


def _photo_id(line: bytes, column: int) -> int:
    """-1 for a line that has none."""
    try:
        return int(line.split(b"\t", column + 1)[column])
    except (ValueError, IndexError):
        return -1


def _photo_ids(subset: Path) -> Int64[np.ndarray, " photos"]:
    """The list's ids, sorted, each once."""
    ids = array.array("q")
    with _opened(subset) as file:
        for number, line in enumerate(file, 1):
            photo = _photo_id(line, 1)
            if photo < 0 or line.count(b"\t") != 2:
                problem = f"line {number} is not line number, photo id and hash"
                raise BadInput(subset, problem, "Get the file again (github.com/openai/CLIP, data/yfcc100m.md)")
            ids.append(photo)
    if not ids:
        raise BadInput(subset, "empty", _REMEDY)
    return np.unique(np.frombuffer(ids, np.int64))


def _batches(path: Path) -> Iterator[tuple[list[bytes], _Columns]]:
    with _opened(path) as file:
        columns = None
        while lines := list(islice(file, _LINES)):
            if columns is None:
                count = lines[0].count(b"\t") + 1
                if count not in _FORMS:
                    raise BadInput(path, f"{count} columns where YFCC100M's metadata has 25, or 23", _REMEDY)
                columns = _FORMS[count]
            yield lines, columns


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with bz2.open(path, "rb") if path.suffix == ".bz2" else path.open("rb") as file:
            yield file
    except (EOFError, OSError) as error:
        raise BadInput(path, f"damaged or cut off ({error})", "Get the file again") from error


def _one_of(folder: Path, name: str) -> Path:
    """The file of that name in the folder, unpacked or as .bz2."""
    for path in (folder / name, folder / f"{name}.bz2"):
        if path.is_file():
            return path
    raise BadInput(folder, f"no {name} or {name}.bz2 in it", _REMEDY)


def _metadata(folder: Path) -> list[Path]:
    parts = {path.name.split(".")[0] for path in folder.glob(f"{METADATA}-[0-9]*")}
    return [_one_of(folder, part) for part in sorted(parts)] if parts else [_one_of(folder, METADATA)]
