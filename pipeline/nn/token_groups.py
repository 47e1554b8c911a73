"""Ways to divide one picture's few vectors into groups, beside k-means: mean-shift, normalised cuts; and group means.

Axes: tokens (or pixels), dim, groups. Ids are contiguous and in reading order of each group's first token.
"""

from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

# How rows of the spectral embedding become groups; scikit-learn's names. Source: cluster_qr, Damle et al. 2019;
# discretize, Yu and Shi 2003; kmeans, Ng et al. 2001.
Assign = Literal["cluster_qr", "discretize", "kmeans"]
# Source: scikit-learn's MeanShift: a mean that moves less than this share of the bandwidth has arrived.
ARRIVED = 1e-3
# Equal tokens have a bandwidth of zero, and rounded distances above it.
LEAST_BANDWIDTH = 1e-6
# Least affinity of two nodes: without any, a picture falls apart and its eigenvectors are not determined.
LEAST_AFFINITY = 1e-4


def in_reading_order(labels: Int64[Tensor, " tokens"]) -> Int64[Tensor, " tokens"]:
    """The same groups with contiguous ids, numbered by their first token."""
    ids, inverse = labels.unique(return_inverse=True)
    position = torch.arange(len(labels), device=labels.device)
    first = torch.full_like(ids, len(labels)).scatter_reduce(0, inverse, position, "amin")
    return first.argsort().argsort()[inverse]


def group_means(x: Float[Tensor, "tokens dim"], labels: Int64[Tensor, " tokens"]) -> Float[Tensor, "groups dim"]:
    """Mean of each group's tokens; ids are contiguous from 0."""
    member = F.one_hot(labels).to(x.dtype).T  # products, not scattered sums: deterministic on a GPU too
    return member @ x / member.sum(1, keepdim=True)


def mean_distance(x: Float[Tensor, "tokens dim"], quantile: float) -> float:
    """Bandwidth for mean-shift: the mean distance to the neighbour at that share of all tokens.

    Source: scikit-learn's `estimate_bandwidth` (a token is its own first neighbour).
    """
    neighbours = max(1, int(len(x) * quantile))
    points = x.double()
    return torch.cdist(points, points).kthvalue(neighbours, dim=1).values.mean().item()


def mean_shift(x: Float[Tensor, "tokens dim"], bandwidth: float, max_iters: int) -> Int64[Tensor, " tokens"]:
    """Groups by mean-shift with a flat kernel, every token a seed.

    A mean moves to the mean of all tokens within the bandwidth until it stays. Of means within a bandwidth of each
    other the one with the most tokens is kept, and tokens join the nearest one that is.

    Source: Comaniciu and Meer 2002, as scikit-learn's `MeanShift` does it; all seeds at once, 50 times faster.
    """
    bandwidth = max(bandwidth, LEAST_BANDWIDTH)
    points = x.double()
    means, counts = points.clone(), torch.ones(len(points), dtype=torch.int64, device=x.device)
    moving = torch.arange(len(points), device=x.device)
    for _ in range(max_iters + 1):
        within = torch.cdist(means[moving], points) <= bandwidth
        counts[moving] = within.sum(1)
        moved = within.double() @ points / counts[moving, None].clamp(min=1)
        moved = torch.where(counts[moving, None] > 0, moved, means[moving])
        step = (moved - means[moving]).norm(dim=1)
        means[moving] = moved
        moving = moving[step > ARRIVED * bandwidth]
        if not len(moving):
            break
    centres = _apart(means[counts > 0], counts[counts > 0], bandwidth)
    return in_reading_order(torch.cdist(points, centres).argmin(1))


def _apart(
    means: Float[Tensor, "seeds dim"], counts: Int64[Tensor, " seeds"], bandwidth: float
) -> Float[Tensor, "centres dim"]:
    """Means in the order of their tokens (then of their values, descending), less those near an earlier one."""
    values, sizes = means.tolist(), counts.tolist()
    order = sorted(range(len(values)), key=lambda i: (sizes[i], values[i]), reverse=True)
    near = (torch.cdist(means, means) <= bandwidth).cpu()
    free, kept = torch.ones(len(values), dtype=torch.bool), []
    for index in order:
        if free[index]:
            kept.append(index)
            free &= ~near[index]
    return means[kept]


def spectral(affinity: Float[Tensor, "tokens tokens"], k: int, assign: Assign) -> Int64[Tensor, " tokens"]:
    """At most k groups by normalised cuts of a symmetric affinity, on one CPU thread; the same every time.

    Affinities below `LEAST_AFFINITY` count as that. Source: Shi and Malik 2000; scikit-learn's `spectral_clustering`.
    """
    from sklearn.cluster import spectral_clustering

    count, device = len(affinity), affinity.device
    if k == 1 or k >= count:
        return torch.arange(count, device=device) if k > 1 else torch.zeros(count, dtype=torch.int64, device=device)
    values = affinity.double().clamp(min=LEAST_AFFINITY).cpu().numpy()
    with _thread_pools().limit(limits=1):
        labels = spectral_clustering(values, n_clusters=k, assign_labels=assign, random_state=0)
    return in_reading_order(torch.tensor(labels, dtype=torch.int64, device=device))


@cache
def _thread_pools() -> Any:
    """numpy's and SciPy's thread pools, found once; on small matrices more than one thread costs more than it gives."""
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController()


def shrunk_colours(image: UInt8[Tensor, "height width 3"], shrink: int) -> Float[Tensor, "rows columns 3"]:
    """RGB in [0, 1] of the picture at a `shrink`-th of its sides, rounded up (means of areas)."""
    size = (-(-image.shape[0] // shrink), -(-image.shape[1] // shrink))
    small = F.interpolate(image.permute(2, 0, 1)[None].float() / 255, size, mode="area")
    return small[0].permute(1, 2, 0)
