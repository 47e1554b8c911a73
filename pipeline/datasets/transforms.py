"""Joint transforms: what moves the pixels moves the pseudo-masks too.

A `View` says which rectangle of the stored image a training input shows, and whether it is mirrored. Rectangles are
in fractions of the stored image, so the same view applies to the pixels and to a label grid of any resolution.
Axes: height, width (pixels of the stored image), side (pixels of the view), rows, columns (cells of a label grid).
"""

import math
from dataclasses import dataclass
from random import Random
from typing import Annotated

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from pipeline.datasets.images import StoredImage
from pipeline.datasets.looks import Look
from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD, OUTSIDE
from pipeline.params import Range

# Source: torchvision's RandomResizedCrop: draws before it gives up and takes the largest centred crop.
CROP_ATTEMPTS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """Random-resized crop and flip; a block of params.yaml.

    Attributes:
        image_size: side of the training input, pixels.
        crop_scale: smallest and largest share of the image's area.
        crop_ratio: smallest and largest width / height.
        flip_chance: chance of mirroring.
    """

    image_size: Annotated[int, Range(1)]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip_chance: Annotated[float, Range(0, 1)]

    def draw(self, image: StoredImage, rng: Random) -> "View":
        """A random view of the image."""
        return random_view(
            rng,
            height=image.height,
            width=image.width,
            scale=self.crop_scale,
            ratio=self.crop_ratio,
            flip_chance=self.flip_chance,
        )

    def look(self, image: StoredImage, view: "View", rng: Random) -> Look:
        """The view as an input; what further is random about it is drawn here."""
        return Look(image, self.image_size, view.paint)


@dataclass(frozen=True, slots=True)
class View:
    """A rectangle of the stored image (fractions in [0, 1], y down) and whether it is mirrored left to right."""

    left: float
    top: float
    width: float
    height: float
    flip: bool

    def paint(
        self, image: UInt8[ndarray, "height width 3"], out: UInt8[ndarray, "side side 3"]
    ) -> UInt8[ndarray, "side side 3"]:
        """`out`, painted with the view's whole pixels, resized (bilinear, antialiased, aspect squashed)."""
        height, width, _ = image.shape
        left, top = round(self.left * width), round(self.top * height)
        right, bottom = left + round(self.width * width), top + round(self.height * height)
        shown = resized(image[top:bottom, left:right], np.empty_like(out) if self.flip else out)
        return cv2.flip(shown, 1, out) if self.flip else shown


def random_view(
    rng: Random,
    *,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    flip_chance: float,
) -> View:
    """A rectangle whose area is a share `scale` of the image and whose aspect (width / height) lies in `ratio`.

    Area uniform, aspect log-uniform, whole pixels; the largest centred crop of an allowed aspect when ten draws do not
    fit. Source: torchvision RandomResizedCrop, which GroupViT and CLIP train with.
    """
    flip = rng.random() < flip_chance
    for _ in range(CROP_ATTEMPTS):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        crop_w, crop_h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_w <= width and 0 < crop_h <= height:
            top = rng.randrange(height - crop_h + 1)
            left = rng.randrange(width - crop_w + 1)
            return View(left / width, top / height, crop_w / width, crop_h / height, flip)
    return _largest_centred(height, width, ratio, flip)


def _largest_centred(height: int, width: int, ratio: tuple[float, float], flip: bool) -> View:
    aspect = min(max(width / height, ratio[0]), ratio[1])
    crop_w = min(width, round(height * aspect))
    crop_h = min(height, round(width / aspect))
    left, top = (width - crop_w) // 2, (height - crop_h) // 2
    return View(left / width, top / height, crop_w / width, crop_h / height, flip)


def resized(
    pixels: UInt8[ndarray, "height width 3"], out: UInt8[ndarray, "side side 3"]
) -> UInt8[ndarray, "side side 3"]:
    """`out`, painted with all of `pixels`, bilinear and antialiased: Pillow's to one level in half of its time.

    What is enlarged has nothing to antialias; OpenCV does that, 0.15 of a level too dark, with less around it.
    """
    side = len(out)
    if pixels.shape[0] <= side and pixels.shape[1] <= side:
        return cv2.resize(pixels, (side, side), out, interpolation=cv2.INTER_LINEAR)
    # The axes in this order, or torch takes the channels not to be last and answers in planes, three times slower.
    planes = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
    shown = F.interpolate(planes, (side, side), mode="bilinear", antialias=True)
    np.copyto(out, shown.numpy()[0].transpose(1, 2, 0))
    return out


def move_labels(
    labels: UInt8[ndarray, "rows columns"], view: View, grid: tuple[int, int]
) -> UInt8[ndarray, "grid_h grid_w"]:
    """The label grid as the view shows it: nearest label at the centre of each of `grid` cells, OUTSIDE past the image.

    Source: S-Seg 3.4 (label map resized to supervise the masks); nearest per card section 2.
    """
    down = view.top + (np.arange(grid[0]) + 0.5) / grid[0] * view.height
    across = view.left + (np.arange(grid[1]) + 0.5) / grid[1] * view.width
    if view.flip:
        across = across[::-1]
    rows = np.floor(down * labels.shape[0]).astype(np.int64)
    columns = np.floor(across * labels.shape[1]).astype(np.int64)
    inside = ((rows >= 0) & (rows < labels.shape[0]))[:, None] & ((columns >= 0) & (columns < labels.shape[1]))
    moved = labels[np.clip(rows, 0, labels.shape[0] - 1)[:, None], np.clip(columns, 0, labels.shape[1] - 1)]
    return np.where(inside, moved, np.uint8(OUTSIDE))


def normalise(images: UInt8[Tensor, "batch side side 3"]) -> Float[Tensor, "batch side side 3"]:
    """uint8 RGB to float32, ImageNet mean and standard deviation; two operations, rounded alike on every device."""
    std = np.asarray(IMAGENET_STD, np.float32)
    # Repeated to the length of a row: broadcast over three values, the loops over them would be three long.
    scale, shift = (
        torch.from_numpy(np.tile(values, images.shape[2])).to(images.device)
        for values in (np.float32(1 / 255) / std, np.asarray(IMAGENET_MEAN, np.float32) / std)
    )
    rows = images.flatten(2).float()
    return rows.mul_(scale).sub_(shift).view(images.shape)
