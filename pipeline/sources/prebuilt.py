"""Shards that somebody has downloaded already: webdataset tars, with img2dataset's Parquet files beside them or not.

A sample is the members of one key: an image, and a caption (`.txt`, or a field of `.json`). Where a Parquet file lies
beside a tar, its rows are the rows, joined to the samples by key; what its download failed at stays a rejected row.
Samples keep the `uid` that a shard of this project gave them. Images go through the same checks and resizing as
downloaded ones; a plain JPEG that needs no resizing keeps its bytes. Only members that `tars` knows are taken: a tar
with others, such as the `.text` of GroupViT's own YFCC shards, is refused by its name.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.shards import SUCCESS
from pipeline.artifacts.tars import index_tar
from pipeline.sources.rows import Row, Rows, chained, clean, one_line
from pipeline.sources.tables import readable
from pipeline.sources.web import is_below

IMAGES = ("jpg", "jpeg", "png", "webp")
_REMEDY = (
    "Set download.annotations to a folder of shards, or to a text file with a tar's name a line and download.images "
    "to the folder or URL that they lie in"
)
_UID = re.compile("[0-9a-f]{16}")  # as `make_uid` makes them
_Index = dict[str, tuple[int, int]]


def root(path: Path, images: Path | None) -> Path:
    """The folder that the tars lie in: `images`, else the folder of shards or of the list."""
    return images or (path if path.is_dir() else path.parent)


def read(path: Path, folder: Path, wanted: tuple[str, str], start: int) -> Rows:
    """Rows tar after tar; an image is named `<tar>/<member>`, relative to `folder`.

    Args:
        path: the folder, whose tars are taken in the order of their names, or a text file that names them. A link to
            a tar, as Hugging Face's cache has it, counts under its own name, wherever it leads.
        wanted: columns of link and caption in Parquet files and JSON members.
    Raises:
        BadInput: a tar is absent, cut off or holds what no shard holds; a Parquet file is torn or has no keys.
    """
    return chained(_tars(path, folder), lambda tar: _rows(tar, folder, wanted), start)


def names(path: Path) -> list[str]:
    """What a text file names, a tar a line.

    Raises:
        BadInput: it is not there, is no text, or names something else.
    """
    if not path.is_file():
        raise BadInput(path, "no such folder or list of shards", _REMEDY)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise BadInput(path, f"not a list of shards ({error})", _REMEDY) from error
    found = [name for line in lines if (name := line.strip())]
    if strange := [name for name in found if not name.endswith(".tar")]:
        raise BadInput(path, f"{strange[0]} is not named *.tar", "Rename it, or name a link to it that ends so")
    return found


def _tars(path: Path, folder: Path) -> list[Path]:
    tars = sorted(path.glob("*.tar")) if path.is_dir() else [folder / name for name in names(path)]
    if not tars:
        raise BadInput(path, "no tar in it", _REMEDY)
    for tar in tars:
        if _place(tar, folder) is None:
            raise BadInput(path, f"{tar} lies outside {folder}", "Set download.images to the folder of the tars")
    return tars


def _place(tar: Path, folder: Path) -> str | None:
    """The tar's name below the folder. What a link there leads to its owner chose; a stranger's list chose the name."""
    for path, above in ((tar, folder), (tar.parent.resolve() / tar.name, folder.resolve())):
        if is_below(path, above):
            return path.relative_to(above).as_posix()
    return None


def _rows(tar: Path, folder: Path, wanted: tuple[str, str]) -> Rows:
    index = index_tar(tar)
    samples: dict[str, dict[str, str]] = {}
    for name in index:
        key, _, kind = name.partition(".")
        samples.setdefault(key, {})[kind.lower()] = name
    table = tar.with_suffix(".parquet")
    place = _place(tar, folder)
    assert place is not None
    with tar.open("rb") as file:
        if table.exists():
            for record in _records(table, wanted):
                members = samples.pop(record["key"] or "", {})
                failed = record.get("status") or SUCCESS
                why = "" if failed == SUCCESS else f"{failed}: {record.get('error_message')}"
                yield _row(place, index, file, record["key"] or "", members, record, wanted, why)
        strange = "no row in the Parquet file" if table.exists() else ""
        for key, members in samples.items():
            yield _row(place, index, file, key, members, {}, wanted, strange)


def _row(
    place: str,
    index: _Index,
    file: BinaryIO,
    key: str,
    members: dict[str, str],
    record: dict[str, Any],
    wanted: tuple[str, str],
    why: str,
) -> Row:
    """One sample as a row; what a Parquet row does not say is looked up in the members."""

    def content(kind: str) -> bytes:
        offset, size = index[members[kind]]
        file.seek(offset)
        return file.read(size)

    if "json" in members and any(record.get(name) is None for name in wanted):
        record = _object(content("json")) | {name: value for name, value in record.items() if value is not None}
    caption = record.get(wanted[1])
    if caption is None and "txt" in members:
        caption = content("txt").decode("utf-8", "replace")
    image = next((members[kind] for kind in IMAGES if kind in members), "")
    if not why and not image:
        why = "no image in the tar"
    elif not why and not isinstance(caption, str):
        why = "no caption"
    uid = record.get("uid")
    uid = uid if isinstance(uid, str) and _UID.fullmatch(uid) else ""
    # In a shard of ours line breaks part captions of one image.
    lines = str(caption or "").split("\n") if uid else [str(caption or "")]
    link = clean(str(record.get(wanted[0]) or "")).strip()
    return Row(
        url=link or f"{place}/{key}",
        caption="\n".join(map(one_line, lines)),
        position=0,
        rejected=why,
        image=f"{place}/{image}" if image else "",
        size=index[image][1] if image else -1,
        uid=uid,
    )


def _records(path: Path, wanted: tuple[str, str]) -> Iterator[dict[str, Any]]:
    """Rows in the order of their keys; img2dataset writes them in the order in which its answers came."""
    remedy = "Get the shard again, or delete this file: captions are then those in the tar"
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            kind = schema.field("key").type if "key" in schema.names else pa.null()
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise BadInput(path, "no column 'key' of text", remedy)
            names = [name for name in ("key", *wanted, "status", "error_message", "uid") if name in schema.names]
            for batch in file.read(names).sort_by("key").to_batches(max_chunksize=4096):
                yield from readable(batch).to_pylist()
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        raise BadInput(path, f"not a whole Parquet file ({error})", remedy) from error


def _object(data: bytes) -> dict[str, Any]:
    """A JSON object's values; none if it is not one."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
