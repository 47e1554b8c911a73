"""ZeroSeg's losses: an image and its segments against frozen embeddings of the image's views, and hidden pixels.

A view is the whole centre square or one tile of a grid over it (`pipeline.caching.teacher`); views are constants.

Source: ZeroSeg section 3, Eq. 1 (card zeroseg.md section 4). The paper states no reduction but the sum over segments;
all others are parameters.

Axes: batch, views, tiles (views without the whole square), groups (segments), dim, tokens (patches), values (pixels of
a patch).
"""

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

Reduction = Literal["sum", "mean"]
ViewReduction = Literal["sum", "mean", "scale_mean"]


def view_weights(scales: Sequence[int], reduction: ViewReduction) -> Float[Tensor, " views"]:
    """What each view's distance counts; a scale n has n * n views, in the order of `scales`.

    sum: 1; mean: 1 / views; scale_mean: every scale counts the same, and so do its views. With equal weights the
    finest grid outvotes the others (16 of 30 views at the paper's scales): a sum of L1 distances is least at the
    weighted median.
    """
    total = sum(n * n for n in scales)
    weight = {
        "sum": lambda n: 1.0,
        "mean": lambda n: 1 / total,
        "scale_mean": lambda n: 1 / (len(scales) * n * n),
    }[reduction]
    return torch.tensor([weight(n) for n in scales for _ in range(n * n)])


def multi_scale_loss(
    image: Float[Tensor, "batch dim"],
    views: Float[Tensor, "batch views dim"],
    weights: Float[Tensor, " views"],
    *,
    over_dims: Reduction,
) -> Float[Tensor, ""]:
    """Weighted sum over views of the L1 distance to the image's vector, mean over the batch. Source: ZeroSeg 3."""
    distance = _reduce((image[:, None] - views.detach()).abs(), over_dims)
    return (distance * weights.to(distance)).sum(dim=1).mean()


def match_loss(
    segments: Float[Tensor, "batch groups dim"],
    tiles: Float[Tensor, "batch tiles dim"],
    *,
    over_dims: Reduction,
    over_segments: Reduction,
) -> tuple[Float[Tensor, ""], Int64[Tensor, "batch groups"]]:
    """L1 distance of every segment to its nearest tile (by the same distance), mean over the batch; and those tiles.

    Which tile is nearest is a constant, so that gradients reach a segment through its own tile only, and no tile gets
    any. Nothing keeps segments from sharing a tile. Source: ZeroSeg Eq. 1, which sums over segments.
    """
    tiles = tiles.detach()
    nearest = torch.cdist(segments.detach(), tiles, p=1.0).argmin(dim=2)
    chosen = tiles.gather(1, nearest[:, :, None].expand(-1, -1, tiles.shape[2]))
    distance = _reduce((segments - chosen).abs(), over_dims)
    return (distance.sum(dim=1) if over_segments == "sum" else distance.mean(dim=1)).mean(), nearest


def reconstruction_loss(
    predicted: Float[Tensor, "batch tokens values"],
    target: Float[Tensor, "batch tokens values"],
    hidden: Bool[Tensor, "batch tokens"],
) -> Float[Tensor, ""]:
    """Mean squared error over the hidden patches of the batch; 0 where none is hidden. Source: MAE's release."""
    error = (predicted - target).square().mean(dim=2)
    return (error * hidden).sum() / hidden.sum().clamp(min=1)


def distinct_tiles(nearest: Int64[Tensor, "batch groups"], num_tiles: int) -> Float[Tensor, ""]:
    """How many tiles an image's segments share, mean over the batch: 1 when all of them chose the same."""
    chosen = torch.zeros(len(nearest), num_tiles, device=nearest.device)
    return chosen.scatter_(1, nearest, 1.0).sum(dim=1).mean()


def _reduce(values: Float[Tensor, "*rows dim"], reduction: Reduction) -> Float[Tensor, "*rows"]:
    return values.sum(dim=-1) if reduction == "sum" else values.mean(dim=-1)
