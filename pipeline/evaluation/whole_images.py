"""The whole image at once for a model, and a label map of it back at the image's size.

One view per image: regions of sliding windows have no common identity to give an oracle label to. Axes: height and
width in pixels of the stored image, grid_h and grid_w = the model's own resolution.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from pipeline.inference import Geometry, nearest, normalise, pad, resize_image


@torch.inference_mode()
def whole_regions(
    regions: Callable[[Tensor], Int64[Tensor, "grid_h grid_w"]],
    image: UInt8[np.ndarray, "height width 3"],
    geometry: Geometry,
    device: str,
) -> Int64[Tensor, "height width"]:
    """A model's hard masks of the whole image, at the image's size."""
    return whole_labels(regions(whole_pixels(image, geometry, device)), image.shape[:2], geometry).cpu()


def whole_pixels(
    image: UInt8[np.ndarray, "height width 3"], geometry: Geometry, device: str
) -> Float[Tensor, "1 3 new_height new_width"]:
    """The whole image for a model, squashed to the geometry's `square`; at its stored size padded as windows are."""
    if geometry.square is None:
        return pad(normalise(image, device), geometry.padded(*image.shape[:2]))
    return normalise(resize_image(image, (geometry.square, geometry.square), True), device)


def whole_labels(
    labels: Int64[Tensor, "grid_h grid_w"], size: tuple[int, ...], geometry: Geometry
) -> Int64[Tensor, "height width"]:
    """A label map of `whole_pixels` at the image's size, by nearest neighbour, without the padding."""
    height, width = size
    seen = geometry.padded(height, width) if geometry.square is None else (height, width)
    return nearest(labels, seen)[:height, :width]
