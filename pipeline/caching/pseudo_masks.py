"""Stage `pseudo_masks`: each image's tokens clustered on their own, a region index per token.

Masks lie in the stored image's frame: a grid over the whole image. Regions are unordered and class-agnostic; they are
numbered in reading order of their first token, so labels are contiguous from 0, and clusters that stayed empty come
last in `centroids` and nowhere in the mask. Seeds come from the sample's uid: the same image has the same regions in
any shard and batch.

Source: S-Seg section on pseudo-masks; card section 2 for what the paper leaves open.
Deviates: the card's default readings are means of unit tokens without scaling them back (`metric` chooses), and
masks of each crop in training, which no cache can hold; here the image is squashed to a square and clustered once.

Axes: rows (images), tokens, dim, k (regions), grid_h = grid_w.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from pipeline.artifacts.arrays import ArrayWriter, map_array, open_array
from pipeline.artifacts.files import CorruptPayload
from pipeline.caching.payloads import MASKS, Precision, check_rows
from pipeline.caching.tokens import Source, Tokens, sources
from pipeline.clustering import Init, Metric, kmeans
from pipeline.engine import Counts, ShardStage, Task
from pipeline.interfaces import OUTSIDE
from pipeline.machine import Machine
from pipeline.params import Range, plain
from pipeline.project import Project

CENTROIDS = "centroids.zarr"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Block `pseudo_masks`.

    Attributes:
        k: regions of an image, at most.
        iters: k-means iterations, at most; an image stops when no label changes.
        metric: "cosine" or "euclidean" distance. Tokens are scaled to unit length first, either way.
        init: first centroids: "k-means++" or "random".
        precision: of the products that find the nearest centroid, on a GPU; a CPU's are float32.
        chunk_rows: images of a zarr chunk; more compress better.
    """

    k: Annotated[int, Range(1, OUTSIDE)]
    iters: Annotated[int, Range(1)]
    metric: Metric
    init: Init
    precision: Precision
    chunk_rows: Annotated[int, Range(1)]


def regions(
    tokens: Float[Tensor, "rows tokens dim"], uids: Sequence[str], config: Config
) -> tuple[UInt8[Tensor, "rows grid_h grid_w"], Float[Tensor, "rows k dim"]]:
    """Masks and float16 centroids of images' tokens (a square grid, row-major), as the stage stores them."""
    grid = isqrt(tokens.shape[1])
    if grid * grid != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} tokens are no square grid")
    labels, centroids = kmeans(
        tokens,
        config.k,
        iters=config.iters,
        metric=config.metric,
        unit=True,
        seeds=torch.tensor([seed(uid) for uid in uids], dtype=torch.int64, device=tokens.device),
        init=config.init,
        products=getattr(torch, config.precision),
    )
    labels, centroids = in_reading_order(labels, centroids)
    return labels.to(torch.uint8).unflatten(1, (grid, grid)), centroids.half()


def seed(uid: str) -> int:
    """The 64-bit seed of a sample: a hash of its name."""
    return int.from_bytes(hashlib.sha256(uid.encode()).digest()[:8], "little", signed=True)


def in_reading_order(
    labels: Int64[Tensor, "rows tokens"], centroids: Float[Tensor, "rows k dim"]
) -> tuple[Int64[Tensor, "rows tokens"], Float[Tensor, "rows k dim"]]:
    """The same clusters numbered by their first token; empty ones last."""
    rows, tokens = labels.shape
    k = centroids.shape[1]
    first = torch.full((rows, k), tokens, device=labels.device)
    position = torch.arange(tokens, device=labels.device).expand(rows, -1)
    order = first.scatter_reduce(1, labels, position, "amin").argsort(dim=1, stable=True)
    renamed = order.argsort(dim=1).gather(1, labels)
    return renamed, centroids.gather(1, order[:, :, None].expand_as(centroids))


@dataclass(frozen=True, slots=True)
class _Args:
    source: Source
    config: Config


def _tasks(project: Project) -> list[Task]:
    config = project.config("pseudo_masks", Config)
    numerics = f"{torch.device(project.machine.device).type}-{config.precision}"
    return [
        Task(
            shard=source.shard,
            fields={"features": source.out, "params": plain(config), "numerics": numerics},
            args=_Args(source, config),
            rows=source.rows,
        )
        for source in sources(project)
    ]


def _compute(task: Task, out: Path, machine: Machine) -> Counts:
    args: _Args = task.args
    config = args.config
    tokens = Tokens(args.source, machine)
    grid, rows = isqrt(tokens.tokens), config.chunk_rows
    with (
        ArrayWriter(out / MASKS, (None, grid, grid), "uint8", chunk_rows=rows, compress=True) as masks,
        ArrayWriter(out / CENTROIDS, (None, config.k, tokens.dim), "float16", chunk_rows=rows, compress=False) as means,
    ):
        for uids, values in tokens.blocks():
            found, centroids = regions(torch.from_numpy(values).to(machine.device), uids, config)
            masks.append(found.cpu().numpy())
            means.append(centroids.cpu().numpy())
    return tokens.finish(out)


def _check(folder: Path, counts: Counts) -> None:
    masks, centroids = open_array(folder / MASKS), map_array(folder / CENTROIDS)
    check_rows(folder, counts, len(centroids))
    if masks.shape[0] != counts.rows:
        raise CorruptPayload(folder / MASKS, f"{masks.shape[0]} rows of {counts.rows}")
    step = masks.chunks[0]
    for start in range(0, counts.rows, step):
        labels = np.asarray(masks[start : start + step])
        values = centroids[start : start + step].astype(np.float32)
        if labels.max() >= centroids.shape[1]:
            raise CorruptPayload(folder / MASKS, f"rows from {start} have labels above {centroids.shape[1] - 1}")
        # unit tokens: their means are no longer than 1
        length = np.linalg.norm(values, axis=2)
        if not np.isfinite(length).all() or length.max() > 1.01:
            raise CorruptPayload(folder / CENTROIDS, f"rows from {start} are not finite, or longer than 1")


STAGE = ShardStage(name="pseudo_masks", schema=1, code_tag=2, tasks=_tasks, compute=_compute, check=_check)
