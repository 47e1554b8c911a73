"""Regions of any source, named by a frozen CLIP: one vector per region, one class distribution per vector.

Axes: regions, height/width in pixels, dim (of the joint space), classes.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor

from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD, ClipEncoder
from pipeline.nn.clip_reader import ClipReader, unit_rows

# A picture to region ids of its size.
ImageRegions = Callable[[UInt8[np.ndarray, "height width 3"]], Int64[Tensor, "height width"]]
# Pixels in the CLIP's own normalisation and the regions of them to a vector per region; of any length.
RegionVectors = Callable[
    [Float[Tensor, "1 3 height width"], Bool[Tensor, "regions height width"]], Float[Tensor, "regions dim"]
]


class RegionClip(ClipReader):
    """A `ScoreModel`: every region of a window has the class probabilities of its vector."""

    one_softmax = True

    def __init__(self, clip: ClipEncoder, image_regions: ImageRegions, vectors: RegionVectors) -> None:
        super().__init__(clip)
        self.image_regions_of, self.vectors = image_regions, vectors

    def segment(
        self, pixels: Float[Tensor, "1 3 height width"], class_embeddings: Float[Tensor, "classes dim"]
    ) -> Float[Tensor, "classes height width"]:
        """Softmax over classes of the scaled cosine of each pixel's region."""
        labels, vectors = self.seen(pixels)
        scores = (self.clip.logit_scale * vectors @ class_embeddings.float().T).softmax(1)
        return scores.T[:, labels.long()]

    def regions(self, pixels: Float[Tensor, "1 3 height width"]) -> Int64[Tensor, "height width"]:
        """The region of each pixel."""
        return self.seen(pixels)[0].long()

    def _read(
        self, pixels: Float[Tensor, "windows 3 height width"]
    ) -> list[tuple[UInt8[Tensor, "height width"], Float[Tensor, "regions dim"]]]:
        """Where the regions lie, and their unit vectors; a window at a time, for each has regions enough."""
        return [self._named(window) for window in pixels.split(1)]

    def _named(
        self, pixels: Float[Tensor, "1 3 height width"]
    ) -> tuple[UInt8[Tensor, "height width"], Float[Tensor, "regions dim"]]:
        ids, labels = self.image_regions_of(picture(pixels)).to(pixels.device).unique(return_inverse=True)
        masks = labels == torch.arange(len(ids), device=labels.device)[:, None, None]
        return labels.byte(), unit_rows(self.vectors(self.own_colours(pixels), masks))


def picture(pixels: Float[Tensor, "1 3 height width"]) -> UInt8[np.ndarray, "height width 3"]:
    """The bytes that ImageNet-normalised pixels were made from."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    colours = (pixels[0] * std + mean) * 255
    return colours.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().cpu().numpy()


def blanked_vectors(
    clip: ClipEncoder,
    pixels: Float[Tensor, "1 3 height width"],
    masks: Bool[Tensor, "regions height width"],
    fill: Float[Tensor, " 3"],
) -> Float[Tensor, "regions dim"]:
    """The CLIP's image vector of each region alone, everything else `fill` (normalised RGB), at the CLIP's size."""
    alone = torch.where(masks[:, None], pixels, fill.view(3, 1, 1).to(pixels))
    side = clip.image_size
    if alone.shape[2:] != (side, side):
        alone = F.interpolate(alone, (side, side), mode="bilinear", align_corners=False, antialias=True)
    return clip.encode_image(alone)


def average_vectors(
    clip: ClipEncoder, pixels: Float[Tensor, "1 3 height width"], masks: Bool[Tensor, "regions height width"]
) -> Float[Tensor, "regions dim"]:
    """Mean of the CLIP's patch vectors in each region, a patch weighing the share of it that the region covers."""
    patches = clip.encode_patches(pixels)[0].float()
    shares = F.adaptive_avg_pool2d(masks[None].float(), (patches.shape[0], patches.shape[1]))[0].flatten(1)
    return shares @ patches.flatten(0, 1) / shares.sum(1, keepdim=True)
