"""Stage `features`: patch tokens of every kept image from the frozen DINO, [rows, tokens, dim].

They are stored as float16, int8 or codes (`pipeline.artifacts.vectors`), or not at all: with `store: none` this stage
has no shards, and what clusters tokens computes them as it goes (`pipeline.caching.tokens`).

The stored image is squashed to a square of `image_size` (bilinear, antialiased) whatever its shape, so that tokens are
a grid over the whole stored image, row-major.

Axes: batch, tokens (grid * grid), dim; height, width in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from pipeline.artifacts.files import BadInput, CorruptPayload
from pipeline.artifacts.quantiser import DIMS
from pipeline.artifacts.vectors import Codec, map_vectors
from pipeline.caching.encoding import Args, Encoding, Stream, encode_shard, half_batch, image_tasks, normalised
from pipeline.caching.payloads import FEATURES, Precision, check_rows
from pipeline.engine import Counts, ShardStage, Task
from pipeline.interfaces import Facet, PatchEncoder
from pipeline.machine import Machine, use_device
from pipeline.params import Range
from pipeline.project import Project


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Block `features`.

    Attributes:
        image_size: side of the square that the encoder sees, pixels; a multiple of its patch size.
        facet: "tokens" (last block, after the final LayerNorm) or "keys" (its attention keys).
        precision: of the encoder's products.
        batch_size: images of a forward pass; in no key, though float32 products of other shapes may round the last
            bit of a value in a thousand otherwise.
        chunk_rows: images of a zarr chunk.
        store: float16, int8 (half the bytes), pq (an eighth) or none (none; every stage that reads tokens encodes the
            images again).
    """

    image_size: Annotated[int, Range(1)]
    facet: Facet
    precision: Precision
    batch_size: Annotated[int, Range(1)]
    chunk_rows: Annotated[int, Range(1)]
    store: Literal[Codec, "none"]


def squash(image: UInt8[np.ndarray, "height width 3"], side: int) -> UInt8[np.ndarray, "side side 3"]:
    """The whole image as a square, bilinear with antialiasing; an image of that size is left as it is."""
    if image.shape[:2] == (side, side):
        return image
    return np.asarray(Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR))


def extract(
    encoder: PatchEncoder, images: Sequence[UInt8[np.ndarray, "height width 3"]], config: Config, device: str
) -> Float[Tensor, "batch tokens dim"]:
    """Tokens of decoded images as the stage stores them (float16, on the CPU), for images outside any shard."""
    stack = torch.from_numpy(np.stack([squash(image, config.image_size) for image in images]))
    return tokens(encoder, stack, config, device).half().cpu()


@torch.no_grad()
def tokens(
    encoder: PatchEncoder, images: UInt8[Tensor, "batch side side 3"], config: Config, device: str
) -> Float[Tensor, "batch tokens dim"]:
    """Float32 tokens of squashed images, on the encoder's device."""
    pixels = normalised(images, encoder.mean, encoder.std, device)
    kind = torch.device(device).type
    with torch.autocast(kind, torch.bfloat16, enabled=config.precision == "bfloat16"):
        return encoder.patch_tokens(pixels, config.facet).float()


@lru_cache(maxsize=1)
def _encoder(folder: Path, digest: str, device: str) -> PatchEncoder:
    """The encoder, once per process; the digest stands for the folder's contents."""
    from pipeline.encoders import load_dino

    return load_dino(folder).to(device)


def _settings(config: Config) -> dict[str, object]:
    """Of the key; `store` is in it where it is not what it was before there was a choice."""
    settings: dict[str, object] = {
        "image_size": config.image_size,
        "facet": config.facet,
        "precision": config.precision,
        "chunk_rows": config.chunk_rows,
    }
    return settings if config.store == "float16" else {**settings, "store": config.store}


def _tasks(project: Project) -> list[Task]:
    return [] if project.config("features", Config).store == "none" else all_tasks(project)


def all_tasks(project: Project) -> list[Task]:
    """A task per shard, whether its tokens are to be stored or not."""
    config = project.config("features", Config)
    return image_tasks(project, "dino", config, _settings(config))


def stream(args: Args[Config], shard: str, device: str) -> Stream:
    """A shard's images as tokens, float32 [batch, tokens, dim].

    Raises:
        BadInput: the image size does not suit the encoder.
    """
    config = args.config
    encoder = _encoder(args.encoder, args.encoder_digest, device)
    grid, rest = divmod(config.image_size, encoder.patch_size)
    if rest:
        problem = f"features.image_size {config.image_size} is no multiple of its patch size {encoder.patch_size}"
        raise BadInput(args.encoder, problem, "Change one of them in params.yaml")
    if config.store == "pq" and encoder.embed_dim % DIMS:
        problem = f"gives vectors of {encoder.embed_dim} values, which cannot be cut into parts of {DIMS}"
        raise BadInput(args.encoder, problem, "Set features.store to int8")
    encoding = Encoding(
        row_shape=(grid * grid, encoder.embed_dim),
        batch_size=config.batch_size,
        prepare=lambda image: squash(image, config.image_size),
        encode=lambda images: tokens(encoder, images, config, device),
    )
    return Stream(args, shard, encoding)


def _compute(task: Task, out: Path, machine: Machine) -> Counts:
    use_device(machine.device)
    args: Args[Config] = task.args
    codec: Any = args.config.store
    return encode_shard(stream(args, task.shard, machine.device), out, FEATURES, codec, args.config.chunk_rows, machine)


def _check(folder: Path, counts: Counts) -> None:
    array = map_vectors(folder / FEATURES)
    check_rows(folder, counts, len(array))
    for row in range(len(array)):
        values = array[row : row + 1][0]
        # float16 squares overflow; of float32 a NaN or an infinity survives the sum
        length = np.square(values, dtype=np.float32).sum(1)
        if not np.isfinite(length).all() or not (length > 0).all():
            raise CorruptPayload(folder / FEATURES, f"row {row} has tokens that are not finite, or zero")


STAGE = ShardStage(
    name="features", schema=1, code_tag=1, tasks=_tasks, compute=_compute, check=_check, shrink=half_batch
)
