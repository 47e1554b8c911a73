"""Stage `teacher`: CLIP embeddings of every kept image's views at several scales, unit vectors in float16 or int8.

A view is a tile of the image's centre square. Scale n cuts the square into n x n tiles without overlap; tile bounds are
i * side / n rounded to whole pixels (halves up), so the tiles of a scale cover the square once. Each tile is cut out
first and then resized (bicubic, antialiased) to the encoder's input: nothing outside it is seen. Views are ordered as
the scales are given, tiles row by row: [1, 2, 3, 4] has the whole square at 0, then 1-4, 5-13 and 14-29.

The cache is that of the stored image's centre square and of nothing else: a student reads the same square, without
random crop or flip. `views.json` holds scales, order and boxes.

Source: ZeroSeg section 3 and card section 3 (tiles at the stored resolution; bounds by rounding).
Deviates: stored as unit vectors, since our CLIP towers return those; the card would store them unnormalised.

Axes: batch (images), views, dim; height, width, side in pixels.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from pipeline.artifacts.files import CorruptPayload, atomic_json, read_json
from pipeline.artifacts.vectors import map_vectors
from pipeline.caching.encoding import Args, Encoding, Stream, encode_shard, half_batch, image_tasks, normalised
from pipeline.caching.payloads import Precision, check_rows
from pipeline.engine import Counts, ShardStage, Task
from pipeline.interfaces import ClipEncoder
from pipeline.machine import Machine, use_device
from pipeline.params import ParamsError, Range
from pipeline.project import Project

ARRAY, VIEWS = "views.zarr", "views.json"
UNIT_TOLERANCE = 2e-3  # of a float16 vector's length; rounding of its values moves it by less than 5e-4
CHECK_ROWS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Block `teacher`.

    Attributes:
        scales: n of the n x n grids, in the order of the stored views.
        precision: of the encoder's products.
        batch_size: views of a forward pass; in no key, see `pipeline.caching.features.Config`.
        chunk_rows: images of a zarr chunk.
        store: float16, or int8 with a scale per vector: half the bytes, cosine at least 0.999.
    """

    scales: tuple[Annotated[int, Range(1, 16)], ...]
    precision: Precision
    batch_size: Annotated[int, Range(1)]
    chunk_rows: Annotated[int, Range(1)]
    store: Literal["float16", "int8"]


def num_views(scales: tuple[int, ...]) -> int:
    """Views of an image: the sum of n^2."""
    return sum(n * n for n in scales)


def boxes(height: int, width: int, scales: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """(left, top, right, bottom) of every view in pixels of the stored image, in the order of the array.

    A tile of an image smaller than the grid is one pixel wide at least; such tiles overlap.
    """
    side = min(height, width)
    left, top = (width - side) // 2, (height - side) // 2
    found = []
    for n in scales:
        bounds = [(2 * i * side + n) // (2 * n) for i in range(n + 1)]
        spans = [(min(low, side - 1), max(high, low + 1)) for low, high in zip(bounds, bounds[1:], strict=False)]
        spans = [(low, min(high, side)) for low, high in spans]
        found += [(left + x0, top + y0, left + x1, top + y1) for y0, y1 in spans for x0, x1 in spans]
    return found


def cut_views(
    image: UInt8[np.ndarray, "height width 3"], scales: tuple[int, ...], side: int
) -> UInt8[np.ndarray, "views side side 3"]:
    """All views of a stored image at the encoder's input size."""
    whole = Image.fromarray(image)
    height, width, _ = image.shape
    return np.stack([_resized(whole.crop(box), side) for box in boxes(height, width, scales)])


def _resized(view: Image.Image, side: int) -> np.ndarray:
    return np.asarray(view if view.size == (side, side) else view.resize((side, side), Image.Resampling.BICUBIC))


@torch.no_grad()
def embed(
    encoder: ClipEncoder, images: UInt8[Tensor, "batch views side side 3"], config: Config, device: str
) -> Float[Tensor, "batch views dim"]:
    """Float32 unit vectors of every view, `config.batch_size` views at a time."""
    flat = images.flatten(0, 1)
    found = []
    for views in flat.split(config.batch_size):
        # A view alone goes with itself: some CPUs round the product of one row otherwise than that of several.
        pixels = normalised(views.repeat(2, 1, 1, 1) if len(views) == 1 else views, encoder.mean, encoder.std, device)
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            found.append(encoder.encode_image(pixels)[: len(views)].float())
    return torch.nn.functional.normalize(torch.cat(found), dim=1).unflatten(0, images.shape[:2])


@lru_cache(maxsize=1)
def _encoder(folder: Path, digest: str, device: str) -> ClipEncoder:
    """The encoder, once per process; the digest stands for the folder's contents."""
    from pipeline.encoders import load_clip

    return load_clip(folder).to(device)


def _tasks(project: Project) -> list[Task]:
    config = project.config("teacher", Config)
    if not config.scales or len(set(config.scales)) < len(config.scales):
        raise ParamsError(f"teacher.scales: {list(config.scales)} is empty or repeats a scale")
    settings = {"scales": list(config.scales), "precision": config.precision, "chunk_rows": config.chunk_rows}
    settings |= {} if config.store == "float16" else {"store": config.store}  # as keys were before there was a choice
    return image_tasks(project, "clip", config, settings)


def _compute(task: Task, out: Path, machine: Machine) -> Counts:
    use_device(machine.device)
    args: Args[Config] = task.args
    config = args.config
    encoder = _encoder(args.encoder, args.encoder_digest, machine.device)
    views = num_views(config.scales)
    encoding = Encoding(
        row_shape=(views, encoder.embed_dim),
        batch_size=max(1, config.batch_size // views),
        prepare=lambda image: cut_views(image, config.scales, encoder.image_size),
        encode=lambda images: embed(encoder, images, config, machine.device),
    )
    counts = encode_shard(Stream(args, task.shard, encoding), out, ARRAY, config.store, config.chunk_rows, machine)
    atomic_json(out / VIEWS, describe(config.scales, encoder.image_size))
    return counts


def describe(scales: tuple[int, ...], side: int) -> dict[str, object]:
    """views.json: which rectangle of the stored image each view is, `[left, top, right, bottom]` in parts of the
    centre square."""
    parts = [[x / n, y / n, (x + 1) / n, (y + 1) / n] for n in scales for y in range(n) for x in range(n)]
    return {
        "square": "the largest centred square of the stored image, offsets rounded down",
        "bounds": "part * side of the square, in pixels, halves rounded up",
        "order": "scales as given, tiles row by row",
        "scales": list(scales),
        "boxes": parts,
        "resized_to": side,
        "filter": "bicubic, antialiased",
        "unit_vectors": True,
    }


def _check(folder: Path, counts: Counts) -> None:
    array = map_vectors(folder / ARRAY)
    check_rows(folder, counts, len(array))
    views = len(read_json(folder / VIEWS, "Run the teacher stage again")["boxes"])
    if array.shape[1] != views:
        raise CorruptPayload(folder / ARRAY, f"{array.shape[1]} views where {VIEWS} names {views}")
    for start in range(0, len(array), CHECK_ROWS):
        length = np.linalg.norm(array[start : start + CHECK_ROWS].astype(np.float32), axis=2)
        if not (np.abs(length - 1) < UNIT_TOLERANCE).all():  # NaN fails too
            raise CorruptPayload(folder / ARRAY, f"rows from {start} have vectors that are not of unit length")


STAGE = ShardStage(
    name="teacher", schema=1, code_tag=1, tasks=_tasks, compute=_compute, check=_check, shrink=half_batch
)
