"""Small whole payloads of download, filter and pseudo-masks, as their stages write them."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from pipeline.artifacts.arrays import ArrayWriter
from pipeline.artifacts.shards import SCHEMA, make_uid, write_shard
from pipeline.artifacts.tables import write_table
from pipeline.datasets.images import StoredImage
from pipeline.datasets.looks import Drawn, Look
from pipeline.datasets.pairs import PairShard
from pipeline.datasets.pixels import Pixels
from pipeline.text import filtering

GRID = 4


def picture(number: int, size: tuple[int, int] = (24, 32)) -> np.ndarray:
    """[height, width, 3]: a colour that tells the pictures apart, brighter to the right and to the bottom."""
    height, width = size
    image = np.zeros((height, width, 3), np.uint8)
    image[..., 0] = 40 + 5 * (number % 40)
    image[..., 1] = np.linspace(0, 200, width)[None]
    image[..., 2] = np.linspace(0, 200, height)[:, None]
    return image


def jpeg(image: np.ndarray) -> bytes:
    """Encoded at a quality that keeps colours."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def label_map(number: int) -> np.ndarray:
    """[GRID, GRID]: four quadrants, numbered from `number % 3`."""
    half = np.arange(GRID) >= GRID // 2
    return (number % 3 + 2 * half[:, None] + half[None]).astype(np.uint8)


def stored(size: tuple[int, int] = (24, 32)) -> StoredImage:
    """An image of a height and width that lies nowhere: what is drawn needs no pixels."""
    return StoredImage("none.tar", "none.jpg", 0, 0, *size)


def shown(look: Look, image: np.ndarray) -> np.ndarray:
    """What a look shows of an image in memory."""
    return look.paint(image, np.empty((look.side, look.side, 3), np.uint8))


def painted(drawn: list[Drawn], images: list[np.ndarray]) -> dict[str, Pixels]:
    """The looks of several samples, each of its own image, as the loader paints them."""
    names = drawn[0].looks
    made = {name: [shown(row.looks[name], image) for row, image in zip(drawn, images, strict=True)] for name in names}
    erased = {name: [row.looks[name].erased for row in drawn] for name in names}
    return {name: Pixels(torch.from_numpy(np.stack(made[name])), erased[name]) for name in names}


def write_pairs(
    root: Path,
    name: str,
    rows: int,
    *,
    rejected: tuple[int, ...] = (),
    masks: bool = True,
    broken: tuple[int, ...] = (),
) -> PairShard:
    """A shard whose row i has picture i (undecodable where `broken`) and the captions "caption i a", "caption i b"."""
    keys = [f"{int(name) * 1000 + i:09d}" for i in range(rows)]
    numbers = dict(zip(keys, range(int(name) * 1000, int(name) * 1000 + rows), strict=True))
    texts = {key: f"caption {number} a\ncaption {number} b" for key, number in numbers.items()}
    uids = {key: make_uid("test", key, texts[key]) for key in keys}
    blank = dict.fromkeys(SCHEMA.names, None)
    table = [
        {**blank, "key": key, "uid": uids[key], "url": key, "caption": texts[key], "status": "success"}
        | {"width": 32, "height": 24, "original_width": 32, "original_height": 24, "sha256": key}
        for key in keys
    ]
    download, filtered = root / name / "download", root / name / "filter"
    download.mkdir(parents=True)
    filtered.mkdir()
    write_shard(
        download, name, table, lambda key: b"no image" if numbers[key] % 1000 in broken else jpeg(picture(numbers[key]))
    )
    kept = [key for key in keys if numbers[key] % 1000 not in rejected]
    columns = {
        "key": keys,
        "uid": [uids[key] for key in keys],
        "status": ["kept" if key in kept else "rejected" for key in keys],
        "reason": ["" if key in kept else "test" for key in keys],
        "nouns": [["dog"] for _ in keys],
        "entities": [[0] for _ in keys],
    }
    write_table(filtered / "rows.parquet", pa.table(columns, schema=filtering.SCHEMA))
    folder = write_masks(root / name / "masks", kept, uids, numbers) if masks else None
    return PairShard(name=name, download=download, filtered=filtered, masks=folder)


def write_masks(folder: Path, keys: list[str], uids: dict[str, str], numbers: dict[str, int]) -> Path:
    """A pseudo_masks payload over `keys`."""
    folder.mkdir()
    with ArrayWriter(folder / "masks.zarr", (len(keys), GRID, GRID), np.uint8, chunk_rows=4, compress=True) as writer:
        writer.append(np.stack([label_map(numbers[key]) for key in keys]))
    write_table(folder / "rows.parquet", pa.table({"key": keys, "uid": [uids[key] for key in keys]}))
    return folder
