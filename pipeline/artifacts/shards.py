"""Image shards in img2dataset's webdataset layout: `NNNNN.tar`, `NNNNN.parquet`, `NNNNN_stats.json`.

The Parquet file has a row per input row, failed ones included, sorted by key; the tar has `<key>.jpg`, `<key>.json` and
`<key>.txt` for each success. `uid` names a sample across shards and settings; `offset` and `size`, in bytes, are where
its image lies in the tar, so that who wants some images reads those, from a disk or out of a bucket.
"""

import hashlib
import io
import json
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import UInt8, UInt64
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.artifacts.files import BadInput, atomic_json
from pipeline.artifacts.tars import index_tar, write_tar
from pipeline.artifacts.urls import PUSH_AGAIN, is_url, read_file

__all__ = ["SCHEMA", "SUCCESS", "Shard", "decode_rgb", "decode_stored", "index_tar", "make_uid", "open_rgb"]
__all__ += ["write_shard", "write_tar"]

SUCCESS = "success"
# Shards of one list; its place in a mix is the first of the five digits of their names. Retried rows have the last.
LIST_SHARDS, RETRIED_PLACE = 10_000, 9
MAX_PIXELS = 1 << 26  # 67 Mpx, 200 MB as RGB: more is taken for a decompression bomb
_REPAIR = "Run `tessera verify --repair download`, then `dvc repro`"
# Pillow's other readers (EPS runs Ghostscript) are closed to untrusted bytes.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# Markers of a JPEG: frames that are coded by Huffman, the start of the pixels, EXIF and XMP.
_FRAMES, _SCAN, _EXIF = (0xC0, 0xC1, 0xC2), 0xDA, 0xE1

# Source: img2dataset 1.47.0, Downloader.download_shard: the input's columns, then its own; the last three are ours.
SCHEMA = pa.schema(
    [
        ("url", pa.string()),
        ("caption", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("sha256", pa.string()),
        ("uid", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
    ]
)
_RECORDED = [name for name in SCHEMA.names if name not in ("offset", "size")]


def make_uid(source: str, url: str, caption: str) -> str:
    """16 hex digits that name a sample wherever it stands."""
    return hashlib.sha256(f"{source}\0{url}\0{caption}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


def uid_numbers(uids: pa.ChunkedArray, path: Path) -> UInt64[np.ndarray, " rows"]:
    """Uids as the numbers that their digits spell. Raises BadInput, which names the file, where one is no uid."""
    try:
        return np.frombuffer(bytes.fromhex("".join(uids.to_pylist())), ">u8", len(uids)).astype(np.uint64)
    except (ValueError, TypeError) as error:
        raise BadInput(path, f"column uid is not 16 hex digits a row ({error})", _REPAIR) from error


class Shard:
    """A shard: a table of its successes and their images, each one read of the tar.

    Attributes:
        name: five digits.
        table: key, uid, caption, width, height (of the stored image, px) of the successes, sorted by key.
    """

    def __init__(self, path: Path, table: pa.Table, index: dict[str, tuple[int, int]]) -> None:
        self.path, self.name, self.table = path, path.stem, table
        self._index = index

    @classmethod
    def open(cls, folder: Path, name: str) -> "Shard":
        """Opens `folder/name.{tar,parquet}`.

        Raises:
            BadInput: a file is absent, torn or of another layout, or the tar's images are not the table's successes.
        """
        rows = read_rows(folder / f"{name}.parquet")
        table = rows.filter(pc.field("status") == SUCCESS).sort_by("key").combine_chunks()
        path = folder / f"{name}.tar"
        index = index_tar(path)
        images = sorted(member[:-4] for member in index if member.endswith(".jpg"))
        if images != table["key"].to_pylist():
            raise BadInput(path, f"{len(images)} images, but {table.num_rows} successes in the Parquet file", _REPAIR)
        places = zip(table["offset"].to_pylist(), table["size"].to_pylist(), strict=True)
        if [index[f"{key}.jpg"] for key in images] != list(places):
            raise BadInput(path, "its images lie elsewhere than the Parquet file says", _REPAIR)
        return cls(path, table.select(["key", "uid", "caption", "width", "height"]), index)

    def __len__(self) -> int:
        return self.table.num_rows

    def image_bytes(self, key: str) -> bytes:
        """The encoded image; no file stays open between two reads. Raises BadInput where the tar ends before."""
        offset, size = self._index[f"{key}.jpg"]
        with open(self.path, "rb", buffering=0) as file:
            return whole(os.pread(file.fileno(), size, offset), size, self.path, f"{key}.jpg")


def whole(data: bytes, size: int, tar: Path | str, name: str) -> bytes:
    """`data`, if that is all of what is called `name` in a tar (path or URL).

    Raises:
        BadInput: the tar ends before.
    """
    if len(data) != size:
        raise BadInput(tar, f"cut off inside {name}", PUSH_AGAIN if is_url(tar) else _REPAIR)
    return data


def read_rows(path: Path | str) -> pa.Table:
    """Every row of a shard's Parquet file, failed ones included. `path`: also its URL.

    Raises:
        BadInput: absent, torn, or columns of `SCHEMA` missing or of another type.
    """
    remedy = PUSH_AGAIN if is_url(path) else _REPAIR
    try:
        file = pa.BufferReader(read_file(str(path))) if is_url(path) else path
        table = pq.ParquetFile(file).read()  # read_table takes `a=b` in a path for a column
    except FileNotFoundError:
        raise BadInput(path, "no such file", remedy) from None
    except (pa.ArrowInvalid, pa.ArrowException, OSError) as error:
        raise BadInput(path, f"not a whole Parquet file ({error})", remedy) from error
    for field in SCHEMA:
        if field.name not in table.column_names or table.schema.field(field.name).type != field.type:
            raise BadInput(path, f"column {field.name!r} of type {field.type} is missing", remedy)
    return table


def read_successes(path: Path | str) -> pa.Table:
    """Of the same file, every row that has an image. Raises BadInput as `read_rows`."""
    rows = read_rows(path)
    return rows.filter(pc.equal(rows["status"], SUCCESS))  # type: ignore[attr-defined]


def write_shard(folder: Path, name: str, rows: Iterable[dict[str, Any]], image: Callable[[str], bytes]) -> None:
    """Writes a shard's three files; equal rows and images give equal bytes.

    Args:
        rows: dicts with the columns of `SCHEMA`, less the images' places.
        image: the encoded JPEG of a key; asked for successes only, in key order.
    """
    rows = sorted(rows, key=lambda row: row["key"])
    ordered = [{field: row[field] for field in _RECORDED} for row in rows]
    write_tar(folder / f"{name}.tar", _members((row for row in ordered if row["status"] == SUCCESS), image))
    places = index_tar(folder / f"{name}.tar")
    for row in ordered:
        row["offset"], row["size"] = places.get(f"{row['key']}.jpg", (None, None))
    pq.write_table(pa.Table.from_pylist(ordered, SCHEMA), folder / f"{name}.parquet", compression="zstd")
    atomic_json(folder / f"{name}_stats.json", _stats(ordered))


def _members(rows: Iterable[dict[str, Any]], image: Callable[[str], bytes]) -> Iterator[tuple[str, bytes]]:
    for row in rows:
        yield f"{row['key']}.jpg", image(row["key"])
        yield f"{row['key']}.json", json.dumps(row, indent=4).encode()
        yield f"{row['key']}.txt", row["caption"].encode()


def _stats(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """img2dataset's statistics less its times, which no two runs share."""
    statuses = Counter(row["status"] for row in rows)
    reasons = Counter(row["error_message"] or row["status"] for row in rows)
    return {
        "count": len(rows),
        "successes": statuses[SUCCESS],
        "failed_to_download": statuses["failed_to_download"],
        "failed_to_resize": statuses["failed_to_resize"],
        "status_dict": dict(sorted(reasons.items())),
    }


def decode_rgb(data: bytes, name: str = "image") -> UInt8[np.ndarray, "height width 3"]:
    """The pixels of `open_rgb`."""
    return np.asarray(open_rgb(data, name))


def decode_stored(data: bytes, name: str = "image") -> UInt8[np.ndarray, "height width 3"]:
    """What `decode_rgb` makes of an image of a shard, in two thirds of its time.

    OpenCV gives Pillow's bits of an ordinary JPEG, and forgives more in a damaged one: what comes from elsewhere is for
    `decode_rgb`, which decides whether it is stored at all.

    Raises:
        BadInput: as `open_rgb`.
    """
    if _is_plain_jpeg(data):
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
        if pixels is not None:
            return pixels
    return np.array(open_rgb(data, name))


def _is_plain_jpeg(data: bytes) -> bool:
    """Whole, three colours of 8 bits, baseline or progressive, and nothing in it that could say how it is turned."""
    if not (data.startswith(b"\xff\xd8") and data.endswith(b"\xff\xd9")):
        return False
    place, plain = 2, False
    while place + 10 < len(data) and data[place] == 0xFF:
        kind, size = data[place + 1], int.from_bytes(data[place + 2 : place + 4])
        if kind in _FRAMES:
            bits, height, width, colours = struct.unpack(">BHHB", data[place + 4 : place + 10])
            plain = bits == 8 and colours == 3 and 0 < height * width <= MAX_PIXELS
        elif kind in (_EXIF, _SCAN):
            return plain and kind == _SCAN
        place += 2 + size
    return False


def open_rgb(data: bytes, name: str = "image") -> Image.Image:
    """Decodes an untrusted image: turned as EXIF says, transparency on white, first frame, 8 bits, RGB.

    Raises:
        BadInput: not an image, cut off, or more than MAX_PIXELS pixels.
    """
    remedy = "Leave it out"
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadInput(name, f"{image.width} x {image.height} px is more than {MAX_PIXELS}", remedy)
            return _to_rgb(image)
    except (BadInput, MemoryError):
        raise
    except Exception as error:  # Pillow lets errors of a dozen types out of its parsers
        raise BadInput(name, _what_is_wrong(data, error), remedy) from error


def _what_is_wrong(data: bytes, error: Exception) -> str:
    """The same words for the same fault: they are counted, and stand in files that two runs must write alike."""
    if not data:
        return "not a readable image (empty file)"
    if isinstance(error, UnidentifiedImageError):
        page = data[:1024].lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<body"))
        return f"not a readable image ({'a web page' if page else 'unknown format'})"
    if "truncated" in str(error).lower():
        return "not a readable image (cut off)"
    return f"not a readable image ({error})"


def _to_rgb(image: Image.Image) -> Image.Image:
    image.load()
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith("I"):  # 16 bits, which PNG and TIFF keep in the low half of I
        return Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        return Image.fromarray(np.asarray(image).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "La", "RGBa"} or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")
