"""Tokens against a codebook of unit centroids: which cluster each cell or pixel belongs to.

Axes: batch, tokens (row-major grid), dim, clusters, height/width (pixels).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def similarities(
    tokens: Float[Tensor, "... tokens dim"], centroids: Float[Tensor, "... clusters dim"]
) -> Float[Tensor, "... tokens clusters"]:
    """Products with the unit centroids, in float32 under autocast too, so that labels are those of any other time.

    Tokens need no unit length: their own does not change which is largest.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        return tokens.float() @ centroids.float().mT


def pixel_groups(
    found: Float[Tensor, "batch tokens clusters"], grid: tuple[int, int], size: tuple[int, int]
) -> Float[Tensor, "batch clusters height width"]:
    """Similarities at pixel resolution (bilinear, half-pixel centres), whose largest is the pixel's region.

    The same as upsampling the tokens first, since products are linear in them; tokens at their own length, as STEGO's
    codes are. Source: card scg.md section 2 (never cluster two resolutions apart).
    """
    return F.interpolate(found.mT.unflatten(2, grid), size, mode="bilinear", align_corners=False)
