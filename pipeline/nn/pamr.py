"""PAMR: score maps refined by the picture's own edges, without training.

Each pixel takes, again and again, the mean of its neighbours' scores, weighted by how alike their colours are; the
neighbours stand in eight directions at several distances, so that few steps reach far.

Axes: channels, height and width in pixels of the score map, near (neighbours: distances x 8 directions).

Source: "Single-Stage Semantic Segmentation from Image Labels" (Araslanov and Roth, CVPR 2020) and its release, as TCL
uses it; evaluation card section 9.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

# Source: TCL's configuration.
DISTANCES = (1, 2, 4, 8, 12, 24)
STEPS = 10
# Source: PAMR's release: share of the local deviation that a colour difference is measured in, and what keeps it off 0.
SHARE, SMALL = 0.1, 1e-8
CHANNELS_AT_ONCE = 2**24  # values of all neighbours held at a time (64 MiB)


def neighbours(
    x: Float[Tensor, "channels height width"], distance: int
) -> Iterator[Float[Tensor, "channels height width"]]:
    """The map moved by `distance` in eight directions; beyond the border stands the border's own value."""
    height, width = x.shape[1:]
    padded = F.pad(x[None], [distance] * 4, mode="replicate")[0]
    for row in (0, distance, 2 * distance):
        for column in (0, distance, 2 * distance):
            if (row, column) != (distance, distance):
                yield padded[:, row : row + height, column : column + width]


def affinities(picture: Float[Tensor, "3 height width"]) -> Float[Tensor, "near height width"]:
    """Weight of each neighbour, positive with sum 1: softmax of minus the mean over colours of the difference, each
    measured in the deviation (n - 1) of the colour over the pixel and its neighbours."""
    near = torch.stack([moved for distance in DISTANCES for moved in neighbours(picture, distance)])
    # The release takes the pixel itself once for every distance.
    around = torch.cat([near, picture.expand(len(DISTANCES), -1, -1, -1)])
    difference = (near - picture).abs() / (SHARE * around.std(0) + SMALL)
    return (-difference.mean(1)).softmax(0)


def refine(
    pixels: Float[Tensor, "1 3 rows columns"], scores: Float[Tensor, "channels height width"]
) -> Float[Tensor, "channels height width"]:
    """The scores after `STEPS` steps, with the picture brought to their size (bilinear, corners aligned, as in TCL)."""
    size = (scores.shape[1], scores.shape[2])
    picture = F.interpolate(pixels.float(), size, mode="bilinear", align_corners=True)[0]
    weights = affinities(picture)
    part = max(1, CHANNELS_AT_ONCE // weights.numel())
    return torch.cat([_steps(scores[start : start + part].float(), weights) for start in range(0, len(scores), part)])


def _steps(
    scores: Float[Tensor, "part height width"], weights: Float[Tensor, "near height width"]
) -> Float[Tensor, "part height width"]:
    for _ in range(STEPS):
        near = torch.stack([moved for distance in DISTANCES for moved in neighbours(scores, distance)])
        scores = torch.einsum("nchw,nhw->chw", near, weights)
    return scores
