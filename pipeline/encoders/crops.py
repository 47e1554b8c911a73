"""DINO's multi-crop: a few large and a few small random views of an image, with random colours.

Geometry is drawn and cut per image in the loader's threads; colours are three factors a view, applied to whole batches.
Axes: views, batch, points (places of the image that both global views show), side (pixels).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Float, Float32, UInt8
from numpy import ndarray
from torch import Tensor

from pipeline.datasets.images import StoredImage
from pipeline.datasets.looks import Drawn, Look
from pipeline.datasets.pairs import Sample
from pipeline.datasets.pixels import Pixels
from pipeline.datasets.transforms import View, random_view
from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD
from pipeline.params import ParamsError, Range

NUM_GLOBAL = 2
# Source: torchvision's RandomResizedCrop, which DINO crops with.
ASPECT = (3 / 4, 4 / 3)
# Source: ITU-R BT.601 luma, as in torchvision's saturation and grayscale.
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
Share = Annotated[float, Range(0, 1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class CropConfig:
    """How views are made.

    Attributes:
        global_size: side of the two large views, pixels.
        global_scale: their smallest and largest share of the image's area.
        num_local: small views.
        local_size: their side, pixels.
        local_scale: their share of the area.
        flip_chance: chance of mirroring a view.
        jitter: brightness, contrast and saturation vary by this factor up and down.
        gray_chance: chance of a view without colour.
        num_points: places per image at which the two global views are compared patch by patch.
    """

    global_size: Annotated[int, Range(1)]
    global_scale: tuple[float, float]
    num_local: Annotated[int, Range(0)]
    local_size: Annotated[int, Range(1)]
    local_scale: tuple[float, float]
    flip_chance: Share
    jitter: Annotated[float, Range(0, 1)]
    gray_chance: Share
    num_points: Annotated[int, Range(0)]

    def __post_init__(self) -> None:
        """Two intervals longer than half an image always meet, so the global views share some place."""
        if self.num_points and self.global_scale[0] * ASPECT[0] <= 0.25:
            raise ParamsError(f"global_scale: must start above {0.25 / ASPECT[0]:.2f} where num_points is above 0")


@dataclass(frozen=True, slots=True)
class Crops:
    """An image's part of a batch, less its pixels; `colours` of every view, see `recolour`."""

    colours: Float32[ndarray, "views 3"]
    points: Float32[ndarray, "2 points 2"]


@dataclass(frozen=True, slots=True)
class CropBatch:
    """ImageNet-normalised views. `points`: the same places in each global view, (x, y) in [-1, 1], y down."""

    global_views: Float[Tensor, "2 batch 3 side side"]
    local_views: Float[Tensor, "locals batch 3 local_side local_side"]
    points: Float[Tensor, "2 batch points 2"]
    uids: list[str]

    def to(self, device: torch.device | str) -> "CropBatch":
        """The same batch on `device`."""
        large, small, points = (
            x.to(device, non_blocking=True) for x in (self.global_views, self.local_views, self.points)
        )
        return CropBatch(large, small, points, self.uids)


@dataclass(frozen=True, slots=True)
class MultiCrop:
    """Draws the views of one image."""

    config: CropConfig

    def __call__(self, sample: Sample, rng: Random) -> Drawn:
        settings = self.config
        large = [self._view(sample.image, settings.global_scale, rng) for _ in range(NUM_GLOBAL)]
        small = [self._view(sample.image, settings.local_scale, rng) for _ in range(settings.num_local)]
        views = len(large) + len(small)
        low, high = 1 - settings.jitter, 1 + settings.jitter
        colours = np.array([[rng.uniform(low, high) for _ in range(3)] for _ in range(views)], np.float32)
        colours[:, 2] *= [rng.random() >= settings.gray_chance for _ in range(views)]
        sides = [settings.global_size] * len(large) + [settings.local_size] * len(small)
        looks = {
            f"view {number}": Look(sample.image, side, view.paint)
            for number, (view, side) in enumerate(zip([*large, *small], sides, strict=True))
        }
        return Drawn(Crops(colours, shared_points(large[0], large[1], settings.num_points, rng)), looks)

    def _view(self, image: StoredImage, scale: tuple[float, float], rng: Random) -> View:
        chance = self.config.flip_chance
        return random_view(rng, height=image.height, width=image.width, scale=scale, ratio=ASPECT, flip_chance=chance)


def shared_points(first: View, second: View, count: int, rng: Random) -> Float32[ndarray, "2 {count} 2"]:
    """`count` random places that both views show, in each view's own coordinates (x, y) in [-1, 1]."""
    low = np.maximum([first.left, first.top], [second.left, second.top])
    high = np.minimum(
        [first.left + first.width, first.top + first.height], [second.left + second.width, second.top + second.height]
    )
    places = low + np.array([[rng.random(), rng.random()] for _ in range(count)]) * (high - low)
    return np.stack([_inside(view, places) for view in (first, second)]).astype(np.float32)


def _inside(view: View, places: Float[ndarray, "points 2"]) -> Float[ndarray, "points 2"]:
    found = (places - [view.left, view.top]) / [view.width, view.height] * 2 - 1
    return found * [-1 if view.flip else 1, 1]


def collate_crops(crops: Sequence[Crops], uids: list[str], shown: dict[str, Pixels]) -> CropBatch:
    """Stack, change the colours and normalise. numpy, because torch would start threads in each loader thread."""
    colours = np.stack([item.colours for item in crops], axis=1)
    views = [pixels.images.numpy() for pixels in shown.values()]
    large = np.stack(views[:NUM_GLOBAL])
    small = np.stack(views[NUM_GLOBAL:]) if views[NUM_GLOBAL:] else large[:0]
    return CropBatch(
        _channels_first(recolour(large, colours[:NUM_GLOBAL])),
        _channels_first(recolour(small, colours[NUM_GLOBAL:])),
        torch.from_numpy(np.stack([item.points for item in crops], axis=1)),
        uids,
    )


def recolour(
    images: UInt8[ndarray, "views batch side side 3"], colours: Float32[ndarray, "views batch 3"]
) -> Float32[ndarray, "views batch side side 3"]:
    """Brightness, then contrast about the image's mean luma, then saturation about each pixel's; ImageNet-normalised.

    `colours` holds the three factors. Source: DINO's augmentation (torchvision ColorJitter, RandomGrayscale).
    Deviates: values may leave [0, 1] instead of being clipped, so that all three and the normalisation are one affine
    map per view; no hue, blur or solarisation.
    """
    views, batch, side = images.shape[:3]
    pixels = images.reshape(views, batch, side * side, 3).astype(np.float32) * np.float32(1 / 255)
    brightness, contrast, saturation = np.moveaxis(colours, -1, 0)
    grey = np.broadcast_to(LUMA, (3, 3))
    mix = saturation[..., None, None] * np.eye(3, dtype=np.float32) + (1 - saturation[..., None, None]) * grey
    matrix = (brightness * contrast)[..., None, None] * mix
    mean_luma = (pixels.mean(axis=2) @ LUMA) * brightness * (1 - contrast)
    std = np.array(IMAGENET_STD, np.float32)
    offset = (mean_luma[..., None] - np.array(IMAGENET_MEAN, np.float32)) / std
    moved = pixels @ (matrix / std[:, None]).swapaxes(-1, -2).astype(np.float32)
    moved += offset[..., None, :].astype(np.float32)
    return moved.reshape(images.shape)


def _channels_first(images: Float32[ndarray, "views batch side side 3"]) -> Float[Tensor, "views batch 3 side side"]:
    return torch.from_numpy(images).permute(0, 1, 4, 2, 3)
