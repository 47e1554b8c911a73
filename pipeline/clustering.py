"""k-means of many small sets at once: the tokens of one image are one set, a batch holds many.

One implementation for CPU and GPU, exact Lloyd iterations on products of the caller's choice (float32 or bfloat16).
Unusual choices, each for a measured reason (benchmarks/bench_kmeans.py):

- Images go through in blocks whose float32 tokens stay in the last-level cache, all iterations of one block first.
- Scores are relative to the mean centroid, which changes no comparison and makes them small where tokens share a
  large common part, as a ViT's do: bfloat16 then rounds differences, not the common part.
- Nearest centroids come from two vectorised maxima over [clusters, tokens]; torch's argmax runs at one value a cycle.
- Sums are scattered in float32 on the CPU, and one-hot products on a GPU, where scattering is not deterministic.
- An image whose labels no longer change is finished; finished images leave the block once half of it is.

Same image, same result: every draw is a hash of (the image's seed, the draw's number), every sum runs over one
image's tokens in their order, and `tokens @ centroids^T` was found not to depend on the batch or on the number of
threads (tests/test_clustering.py holds it), so an image gives the same bits alone, in a batch of a thousand and at any
place in it. This holds on one kind of machine; another CPU or a GPU rounds products differently.

Axes: batch (images), tokens, dim, clusters, picks (tokens among which first centroids are drawn).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

Metric = Literal["cosine", "euclidean"]
Init = Literal["k-means++", "random"]

# Tokens of a block in float32, by device type: a CPU's last-level cache; on a GPU enough images to fill it.
BLOCK_BYTES = {"cpu": 10 << 20, "cuda": 1 << 30}
# First centroids are drawn among this many tokens per cluster, at most MOST_PICKS (whose products are quadratic).
PICKS_PER_CLUSTER, MOST_PICKS = 8, 1024
# A token this close to its centroid (squared distance, as a share of its squared length) lies on it: rounding.
ON_CENTROID = 1e-9
UNIT_TOLERANCE = 1e-5  # lengths this close to 1 are left alone, so that unit tokens keep their bits
HUGE = 3e38  # below float32's largest value


@torch.no_grad()
def kmeans(
    x: Float[Tensor, "batch tokens dim"],
    k: int,
    *,
    iters: int,
    generator: torch.Generator | None = None,
    metric: Metric = "cosine",
    seeds: Int64[Tensor, " batch"] | None = None,
    init: Init = "k-means++",
    products: torch.dtype = torch.float32,
) -> tuple[Int64[Tensor, "batch tokens"], Float[Tensor, "batch clusters dim"]]:
    """Labels in [0, k) and float32 centroids of every image on its own.

    `iters` times at most: every token joins its nearest centroid, every centroid moves to the mean of its tokens. The
    labels are those of the last assignment and the centroids are their means. "cosine": tokens are scaled to unit
    length first and centroids after each step (spherical k-means); a zero token has no direction and joins any
    cluster. "euclidean": squared distance.

    A cluster that lost all tokens restarts at the token farthest from its own centroid. Where every token lies on its
    centroid (fewer distinct tokens than k) clusters stay empty: their labels do not occur, and their centroids are
    where they were last put.

    `seeds` has one seed per image, which makes results independent of the batch; without it they are drawn from
    `generator`. `products`: the type of the assignment's products; everything else is float32.

    Source: Lloyd 1982; k-means++, Arthur and Vassilvitskii 2007; restarts as faiss and scikit-learn do.
    Deviates: "k-means++" draws among 8k tokens spread evenly over the image, not among all: one small product matrix
    per image in place of k - 1 passes over the tokens. S-Seg card section 2 has plain means on unit tokens ("L2, then
    Euclidean"); that is unit tokens with metric "euclidean".

    Raises:
        ValueError: k or iters below 1, no tokens, neither seeds nor generator, or tokens that are not finite.
    """
    batch, tokens, dim = x.shape
    if k < 1 or iters < 1 or tokens < 1 or dim < 1:
        raise ValueError(f"k-means of {tokens} tokens of {dim} values with k={k}, iters={iters}: all must be positive")
    if seeds is None:
        if generator is None:
            raise ValueError("k-means needs seeds, one per image, or a generator to draw them from")
        seeds = torch.randint(2**62, (batch,), generator=generator, device=generator.device).to(x.device)
    labels = torch.empty(batch, tokens, dtype=torch.int64, device=x.device)
    centroids = torch.empty(batch, k, dim, device=x.device)
    size = max(1, BLOCK_BYTES[x.device.type] // (tokens * dim * 4))
    with torch.autocast(x.device.type, enabled=False):
        for start in range(0, batch, size):
            block = slice(start, start + size)
            values = _prepare(x[block], metric, start)
            first = _first_centroids(values, k, seeds[block], init, metric)
            labels[block], centroids[block] = _lloyd(values, first, iters, metric, products)
    return labels, centroids


def _prepare(x: Float[Tensor, "batch tokens dim"], metric: Metric, start: int) -> Float[Tensor, "batch tokens dim"]:
    """Float32 tokens, of unit length where the metric asks for it; refuses what is not finite."""
    values = x.float().contiguous()
    finite = torch.isfinite(values.sum((1, 2)))  # isfinite of every value takes fifty times as long
    if not finite.all():
        raise ValueError(
            f"tokens of image {start + int(finite.logical_not().nonzero()[0])} of the batch are not finite"
        )
    if metric == "cosine":
        length = torch.linalg.vector_norm(values, dim=2, keepdim=True)
        if ((length - 1).abs() > UNIT_TOLERANCE).any():
            # Dividing by exactly 1 changes no bit, so the other images of the block do not matter.
            values = values / torch.where((length - 1).abs() > UNIT_TOLERANCE, length, 1).clamp_min(1e-30)
    return values


def _first_centroids(
    values: Float[Tensor, "batch tokens dim"], k: int, seeds: Int64[Tensor, " batch"], init: Init, metric: Metric
) -> Float[Tensor, "batch clusters dim"]:
    """k tokens of every image: spread evenly ("random"), or far from each other ("k-means++")."""
    batch, tokens, _ = values.shape
    count = k if init == "random" else min(tokens, max(k, min(PICKS_PER_CLUSTER * k, MOST_PICKS)))
    rows = torch.arange(batch, device=values.device)[:, None]
    # One token from each of `count` equal stretches of the image: random, distinct where there are enough tokens.
    stretch = torch.arange(count, device=values.device) + _uniform(seeds, 0, count)
    picks = values[rows, (stretch * (tokens / count)).long().clamp_max(tokens - 1)]
    if init == "random":
        return picks
    centred = picks - picks.mean(1, keepdim=True)
    product = torch.bmm(centred, centred.transpose(1, 2))
    square = product.diagonal(dim1=1, dim2=2)
    distance = (square[:, :, None] + square[:, None] - 2 * product).clamp_min_(0)
    draws = _uniform(seeds, count, k)
    chosen = torch.empty(batch, k, dtype=torch.int64, device=values.device)
    closest = torch.ones_like(square)  # the first centroid is any of the picks
    for j in range(k):
        total = closest.cumsum(1)
        # Where all weights are zero (fewer distinct tokens than k) this is the last pick, once more.
        chosen[:, j] = (total <= draws[:, j : j + 1] * total[:, -1:]).sum(1).clamp_max_(count - 1)
        to_chosen = distance[rows[:, 0], chosen[:, j]]
        closest = to_chosen if j == 0 else torch.minimum(closest, to_chosen)
    return picks[rows, chosen]


@dataclass(slots=True)
class _Block:
    """Images that are still moving; `rows` are their places in the block that was handed in."""

    rows: Int64[Tensor, " batch"]
    values: Float[Tensor, "batch tokens dim"]
    operand: Tensor
    centroids: Float[Tensor, "batch clusters dim"]
    labels: Int64[Tensor, "batch tokens"]

    def keep(self, moving: Tensor) -> "_Block":
        parts = (self.rows, self.values, self.operand, self.centroids, self.labels)
        return _Block(*(part[moving] for part in parts))


def _lloyd(
    values: Float[Tensor, "batch tokens dim"],
    first: Float[Tensor, "batch clusters dim"],
    iters: int,
    metric: Metric,
    products: torch.dtype,
) -> tuple[Int64[Tensor, "batch tokens"], Float[Tensor, "batch clusters dim"]]:
    batch, tokens, _ = values.shape
    none = torch.full((batch, tokens), -1, device=values.device)
    labels, centroids = none.clone(), first.clone()
    rows = torch.arange(batch, device=values.device)
    block = _Block(rows, values, values.to(products), first, none)
    for _ in range(iters):
        nearest = _nearest(block.operand, block.centroids, metric)
        moving = (nearest != block.labels).any(1)
        block.labels = nearest
        if not moving.any():
            break
        if 2 * int(moving.sum()) <= len(moving):
            labels[block.rows], centroids[block.rows] = block.labels, block.centroids
            block = block.keep(moving)
        # A finished image that stays comes out of the step as it went in.
        block.centroids = _means(block.values, block.labels, block.centroids, metric)
    labels[block.rows], centroids[block.rows] = block.labels, block.centroids
    return labels, centroids


def _nearest(
    operand: Tensor, centroids: Float[Tensor, "batch clusters dim"], metric: Metric
) -> Int64[Tensor, "batch tokens"]:
    """The centroid with the largest score x.c (cosine) or x.c - |c|^2 / 2; the lowest index of equals."""
    k = centroids.shape[1]
    relative = (centroids - centroids.mean(1, keepdim=True)).to(operand.dtype)
    # [batch, clusters, tokens]: the product is fast and independent of the batch as tokens x clusters, the maxima
    # over clusters are fast with tokens last.
    scores = torch.bmm(operand, relative.transpose(1, 2)).transpose(1, 2).contiguous().float()
    if metric == "euclidean":
        scores -= centroids.square().sum(2, keepdim=True) / 2
    gap = scores.sub_(scores.amax(1, keepdim=True))  # 0 at the best, negative elsewhere
    rank = torch.arange(k, 0, -1, dtype=torch.float32, device=operand.device)[:, None]
    return k - torch.add(rank, gap, alpha=HUGE).amax(1).long()


def _means(
    values: Float[Tensor, "batch tokens dim"],
    labels: Int64[Tensor, "batch tokens"],
    centroids: Float[Tensor, "batch clusters dim"],
    metric: Metric,
) -> Float[Tensor, "batch clusters dim"]:
    """Means of the clusters (scaled to unit length for cosine); empty ones restart, see `_restart`."""
    batch, k, dim = centroids.shape
    if values.device.type == "cpu":
        place = (labels + k * torch.arange(batch)[:, None]).flatten()
        counts = torch.bincount(place, minlength=batch * k).view(batch, k, 1)
        sums = torch.zeros(batch * k, dim)
        sums.scatter_add_(0, place[:, None].expand(-1, dim), values.view(-1, dim))
        sums = sums.view(batch, k, dim)
    else:
        one_hot = (labels[:, None] == torch.arange(k, device=labels.device)[:, None]).to(values.dtype)
        counts, sums = one_hot.sum(2, keepdim=True), torch.bmm(one_hot, values)
    means = functional.normalize(sums, dim=2) if metric == "cosine" else sums / counts.clamp_min(1)
    empty = counts == 0
    if not empty.any():
        return means
    means = torch.where(empty, centroids, means)
    some = empty.any(1)[:, 0].nonzero()[:, 0]
    means[some] = _restart(values[some], labels[some], means[some], empty[some, :, 0])
    return means


def _restart(
    values: Float[Tensor, "batch tokens dim"],
    labels: Int64[Tensor, "batch tokens"],
    means: Float[Tensor, "batch clusters dim"],
    empty: Tensor,
) -> Float[Tensor, "batch clusters dim"]:
    """Put the i-th empty cluster on the i-th farthest token from its own mean, unless that lies on its mean."""
    own = means.gather(1, labels[:, :, None].expand(-1, -1, means.shape[2]))
    distance = (values - own).square().sum(2)
    distance[distance <= ON_CENTROID * values.square().sum(2)] = 0
    count = min(means.shape[1], values.shape[1])
    far, token = distance.sort(dim=1, descending=True, stable=True)
    turn = (empty.cumsum(1) - 1).clamp(0, count - 1)
    restart = empty & (far.gather(1, turn) > 0)
    target = values.gather(1, token.gather(1, turn)[:, :, None].expand(-1, -1, values.shape[2]))
    return torch.where(restart[:, :, None], target, means)


def _uniform(seeds: Int64[Tensor, " batch"], start: int, count: int) -> Float[Tensor, "batch count"]:
    """Draws start .. start + count - 1 of every seed, in [0, 1): a hash of seed and number, on any device the same.

    Source: splitmix64 (Steele, Lea and Flood 2014), its increment and finaliser; int64 wraps as uint64 does.
    """
    number = torch.arange(start + 1, start + count + 1, device=seeds.device)
    z = _mix(seeds)[:, None] + number * -7046029254386353131
    return (_shift(_mix(z), 40)).float() / 2**24


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift(z, 30)) * -4658895280553007687
    z = (z ^ _shift(z, 27)) * -7723592293110705685
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
