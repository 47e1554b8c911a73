"""Bipartite matching of predictions to targets, a batch at a time.

Axes: batch, queries (predictions), targets.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


class BadCost(ValueError):
    """A cost is NaN or infinite, so that no assignment exists: the masks' logits have diverged.

    Attributes:
        images: places in the batch.
    """

    def __init__(self, images: list[int]) -> None:
        super().__init__(f"the matching cost of images {images} of the batch is not finite")
        self.images = images

    def __reduce__(self) -> tuple:
        return type(self), (self.images,)


def assign(
    cost: Float[Tensor, "batch queries targets"], present: Bool[Tensor, "batch targets"]
) -> Int64[Tensor, "batch targets"]:
    """The query of each target so that the summed cost is least; -1 where a target is not `present`.

    Every present target gets a query of its own; queries left over are matched to nothing, at no cost.
    Source: DETR, MaskFormer; S-Seg 3.4 (no cost for no-object).

    Raises:
        BadCost: not finite.
        ValueError: more targets present than queries.
    """
    from scipy.optimize import linear_sum_assignment

    costs, there = cost.detach().float().cpu().numpy(), present.cpu().numpy()
    if not np.isfinite(costs).all():
        raise BadCost(np.flatnonzero(~np.isfinite(costs).all(axis=(1, 2))).tolist())
    if there.sum(axis=1).max(initial=0) > costs.shape[1]:
        raise ValueError(f"{there.sum(axis=1).max()} targets for {costs.shape[1]} queries")
    matched = np.full(there.shape, -1, np.int64)
    for image, (one, columns) in enumerate(zip(costs, there, strict=True)):
        targets = np.flatnonzero(columns)
        # Transposed, fewer rows than columns: every target is assigned, in the order of `targets`.
        _, matched[image, targets] = linear_sum_assignment(one[:, targets].T)
    return torch.from_numpy(matched).to(cost.device)
