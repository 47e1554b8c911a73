"""Training inputs for a student of cached views: each image's centre square, exactly as the teacher saw it.

A random crop or flip would move tiles away from the vectors that are cached for them, so nothing here is random.
Source: ZeroSeg 4.1 (centre crop and no other augmentation).

Axes: side (pixels), views, dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from numpy import ndarray
from PIL import Image

from pipeline.artifacts.files import BadInput, read_json
from pipeline.artifacts.vectors import map_vectors
from pipeline.caching.teacher import ARRAY, VIEWS, boxes, describe
from pipeline.datasets.looks import Drawn, Look
from pipeline.datasets.pairs import PairShard, Sample
from pipeline.datasets.pixels import Packed, Pixels
from pipeline.interfaces import TrainBatch

REMEDY = "Run `dvc repro teacher`"


@dataclass(frozen=True, kw_only=True, slots=True)
class SquareTransform:
    """The square that the teacher saw, and its views that are learned from, in float32.

    `chosen`: places of the wanted views among the cached ones.
    """

    image_size: int
    chosen: tuple[int, ...]

    def __call__(self, sample: Sample, rng: Random) -> Drawn:
        if sample.views is None:
            raise ValueError(f"{sample.uid} has no views")
        views = sample.views[list(self.chosen)].astype(np.float32)
        return Drawn(views, {"pixels": Look(sample.image, self.image_size, paint_square)})


def paint_square(
    image: UInt8[ndarray, "height width 3"], out: UInt8[ndarray, "side side 3"]
) -> UInt8[ndarray, "side side 3"]:
    """`out`, painted with the image's centre square; bicubic, antialiased, as the teacher's views are."""
    height, width, _ = image.shape
    left, top, right, bottom = boxes(height, width, (1,))[0]
    shown = Image.fromarray(image[top:bottom, left:right])
    if shown.size != out.shape[:2]:
        shown = shown.resize(out.shape[:2], Image.Resampling.BICUBIC)
    np.copyto(out, np.asarray(shown))
    return out


def collate(
    views: list[Float32[ndarray, "views dim"]], uids: list[str], shown: dict[str, Pixels]
) -> Packed[TrainBatch]:
    """Stack; there are no texts."""
    others = {
        "captions": [""] * len(views),
        "token_ids": torch.zeros(len(views), 0, dtype=torch.int64),
        "regions": None,
        "uids": uids,
        "views": torch.from_numpy(np.stack(views)),
    }
    return Packed(TrainBatch, shown, others)


def choose_views(shards: Sequence[PairShard], scales: tuple[int, ...], embed_dim: int) -> tuple[int, ...]:
    """Places of the wanted scales' views among the cached ones, found by their boxes.

    Raises:
        BadInput: a cache lacks a scale, was cut by another rule than `pipeline.caching.teacher`'s, differs from the
            others, or has vectors of another width.
    """
    wanted: Any = describe(scales, 1)["boxes"]
    chosen: tuple[int, ...] | None = None
    for shard in shards:
        if shard.views is None:
            raise BadInput(f"shard {shard.name}", "has no teacher views", REMEDY)
        stored = read_json(shard.views / VIEWS, REMEDY)
        if stored != describe(tuple(stored.get("scales", ())), stored.get("resized_to", 0)):
            raise BadInput(shard.views / VIEWS, "describes views that are not cut as this version cuts them", REMEDY)
        absent = sorted(set(scales) - set(stored["scales"]))
        if absent:
            remedy = "Add it to teacher.scales, or take it from train.zeroseg.scales"
            raise BadInput(shard.views / VIEWS, f"has scales {stored['scales']} and not {absent[0]}", remedy)
        places = tuple(stored["boxes"].index(box) for box in wanted)
        if chosen not in (None, places):
            raise BadInput(shard.views / VIEWS, "has its views in another order than the shard before", REMEDY)
        chosen = places
        shape = map_vectors(shard.views / ARRAY).shape
        if tuple(shape[1:]) != (len(stored["boxes"]), embed_dim):
            problem = f"holds {shape[1]} views of {shape[2]}, not {len(stored['boxes'])} of {embed_dim}"
            raise BadInput(shard.views / ARRAY, problem, "Set train.zeroseg.embed_dim to the CLIP's width")
    return chosen or ()
