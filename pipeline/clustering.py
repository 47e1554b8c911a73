"""k-means of many small sets at once: the tokens of one image are one set, a batch holds many.

One implementation for CPU and GPU, exact Lloyd iterations on products of the caller's choice (float32 or bfloat16).
Unusual choices, each for a measured reason (benchmarks/bench_kmeans.py):

- Images go through in blocks that fit a CPU's last-level cache; finished ones leave once half of a block is.
- Scores are relative to the mean centroid, which changes no comparison and makes them small where tokens share a
  large common part, as a ViT's do: bfloat16 then rounds differences, not the common part.
- Nearest centroids come from two vectorised maxima over [clusters, tokens]; torch's argmax runs at one value a cycle.
- Sums are corrected in float32 for the tokens that changed clusters.
- On a GPU all iterations of an image are one program of one kernel (`pipeline.fused_lloyd`); where that does not fit,
  the steps above run there too, with one-hot products for sums, since scattering is not deterministic.

Same image, same result: every draw is a hash of (the image's seed, the draw's number), every sum runs over one image's
tokens in their order, and the bits of `tokens @ centroids^T` do not depend on the batch or the number of threads
(tests/test_clustering.py holds it). This is so on one kind of machine; another CPU or a GPU rounds products otherwise.

Axes: batch (images), tokens, dim, clusters, picks (tokens among which first centroids are drawn).
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

Metric = Literal["cosine", "euclidean"]
Init = Literal["k-means++", "random"]

# Tokens of a block in float32, by device type: a CPU's share of its cache; on a GPU enough images to fill it.
BLOCK_BYTES = {"cpu": 10 << 20, "cuda": 1 << 30}
# k-means++ draws first centroids among this many tokens per cluster, within bounds (their products are quadratic).
# Measured: 2, 4, 8 per cluster and all tokens end within 0.5 % of each other's objective, in no order.
PICKS_PER_CLUSTER, LEAST_PICKS, MOST_PICKS = 4, 64, 1024
# A token this close to its centroid (squared distance, as a share of its squared length) lies on it: rounding.
ON_CENTROID = 1e-9
# Images whose first centroids are drawn in one go, many small steps: within a CPU's cache, few launches on a GPU.
SEEDED_TOGETHER = {"cpu": 64, "cuda": 4096}
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
    centroid (fewer distinct tokens than k) it stays empty: its label does not occur, its centroid is where it was put.

    An image is finished when none of its tokens changes clusters. `seeds` has one seed per image, which makes results
    independent of the batch; without it they are drawn from `generator`. `products`: the type of the assignment's
    products; everything else is float32.

    Source: Lloyd 1982; k-means++, Arthur and Vassilvitskii 2007; restarts as faiss and scikit-learn do.
    Deviates: "k-means++" draws among 4k tokens (64 at least) spread evenly over the image, not among all: one small
    product matrix per image in place of k - 1 passes over the tokens. S-Seg card section 2 reads "L2, then Euclidean",
    means of unit tokens that are not scaled back: that is unit tokens with metric "euclidean".

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
    size = min(batch, max(1, BLOCK_BYTES[x.device.type] // (tokens * dim * 4)))
    with torch.autocast(x.device.type, enabled=False):
        together = SEEDED_TOGETHER[x.device.type]
        for start in range(0, batch, together):
            group = slice(start, start + together)
            centroids[group] = _first_centroids(x[group], k, seeds[group], init, metric)
        fused = x.is_cuda and fused_lloyd().fits(k, dim, x.device)
        lloyd = (_FusedLloyd if fused else _Lloyd)((size, tokens, dim), k, metric, products, x.device)
        for start in range(0, batch, max(1, size)):
            block = slice(start, start + size)
            values = lloyd.prepare(x[block], start)
            labels[block], centroids[block] = lloyd.run(values, centroids[block], iters)
    return labels, centroids


def fused_lloyd() -> Any:
    """The kernel's module, which imports Triton: torch has it on Linux alone."""
    from pipeline import fused_lloyd

    return fused_lloyd


def _lengths(values: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens 1"]:
    """What to divide tokens by to make them of unit length: exactly 1 for those that are, so that they keep their
    bits whatever stands beside them; and for zeros a number that leaves them zero."""
    length = torch.linalg.vector_norm(values, dim=2, keepdim=True)
    return torch.where((length - 1).abs() > UNIT_TOLERANCE, length, 1).clamp_min_(1e-30)


def _first_centroids(
    x: Float[Tensor, "batch tokens dim"], k: int, seeds: Int64[Tensor, " batch"], init: Init, metric: Metric
) -> Float[Tensor, "batch clusters dim"]:
    """k tokens of every image: spread evenly ("random"), or far from each other ("k-means++")."""
    batch, tokens, dim = x.shape
    count = k if init == "random" else min(tokens, max(k, LEAST_PICKS, min(PICKS_PER_CLUSTER * k, MOST_PICKS)))
    rows = torch.arange(batch, device=x.device)
    # One token from each of `count` equal stretches of the image: random, distinct where there are enough tokens.
    stretch = torch.arange(count, device=x.device) + _uniform(seeds, 0, count)
    place = (stretch * (tokens / count)).long().clamp_max(tokens - 1) + tokens * rows[:, None]
    flat = x.reshape(-1, dim)
    picks = flat.index_select(0, place.flatten()).view(batch, count, dim).float()
    if metric == "cosine":
        picks /= _lengths(picks)
    if init == "random":
        return picks
    picks -= picks.mean(1, keepdim=True)
    product = torch.bmm(picks, picks.transpose(1, 2))
    square = product.diagonal(dim1=1, dim2=2)
    distance = (square[:, :, None] + square[:, None] - 2 * product).clamp_min_(0)
    draws = _uniform(seeds, count, k)
    chosen = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    closest = torch.ones_like(square)  # the first centroid is any of the picks
    for j in range(k):
        total = closest.cumsum(1)
        # Where all weights are zero (fewer distinct tokens than k) this is the last pick, once more.
        chosen[:, j] = (total <= draws[:, j : j + 1] * total[:, -1:]).sum(1).clamp_max_(count - 1)
        to_chosen = distance[rows, chosen[:, j]]
        closest = to_chosen if j == 0 else torch.minimum(closest, to_chosen)
    first = flat.index_select(0, place.gather(1, chosen).flatten()).view(batch, k, dim).float()
    return first / _lengths(first) if metric == "cosine" else first


class _Lloyd:
    """Lloyd iterations of one block of images after another; `shape` is the largest block's.

    Memory is allocated once: page faults of a block's worth of it cost as much as the products do.
    """

    def __init__(
        self, shape: tuple[int, int, int], k: int, metric: Metric, products: torch.dtype, device: torch.device
    ) -> None:
        batch, tokens, _ = shape
        self.k = k
        self.metric: Metric = metric
        self.values = torch.empty(shape, device=device)
        self.operand = torch.empty(shape, dtype=products, device=device)
        self.products = torch.empty(batch, tokens, k, dtype=products, device=device)
        self.scores = torch.empty(batch, k, tokens, device=device)
        self.rank = torch.arange(k, 0, -1, dtype=torch.float32, device=device)[:, None]

    def prepare(self, x: Float[Tensor, "batch tokens dim"], start: int) -> Float[Tensor, "batch tokens dim"]:
        """Float32 tokens, of unit length where the metric asks for it; refuses what is not finite."""
        own = self.values[: len(x)]
        values = x if x.dtype == torch.float32 and x.is_contiguous() else own.copy_(x)
        _demand_finite(values, start)
        if self.metric == "cosine" and ((lengths := _lengths(values)) != 1).any():
            values = torch.div(values, lengths, out=own)
        return values

    def run(
        self, values: Float[Tensor, "batch tokens dim"], first: Float[Tensor, "batch clusters dim"], iters: int
    ) -> tuple[Int64[Tensor, "batch tokens"], Float[Tensor, "batch clusters dim"]]:
        """Labels and centroids of `values`, from the `first` centroids."""
        batch, tokens, _ = values.shape
        found, means = torch.empty(batch, tokens, dtype=torch.int64, device=values.device), torch.empty_like(first)
        operand = self.operand[:batch].copy_(values)
        rows = torch.arange(batch, device=values.device)  # images in work
        labels, sums, centroids = torch.full_like(found, -1), torch.zeros_like(first), first
        for _ in range(iters):
            nearest = self._nearest(operand, centroids)
            moving = (nearest != labels).any(1)
            left = int(moving.sum())
            if left == 0:
                break
            if 2 * left <= len(rows):
                found[rows], means[rows] = labels, centroids
                rows, nearest, labels = rows[moving], nearest[moving], labels[moving]
                sums, centroids, operand = sums[moving], centroids[moving], operand[:left]
                for place, row in enumerate(rows.tolist()):
                    operand[place].copy_(values[row])
            # A finished image that is still in work comes out of the step as it went in.
            _move(sums, values, rows, labels, nearest)
            labels, centroids = nearest, _means(values, rows, nearest, sums, centroids, self.metric)
        found[rows], means[rows] = labels, centroids
        return found, means

    def _nearest(
        self, operand: Tensor, centroids: Float[Tensor, "batch clusters dim"]
    ) -> Int64[Tensor, "batch tokens"]:
        """The centroid with the largest score x.c (cosine) or x.c - |c|^2 / 2; the lowest index of equals."""
        batch = len(operand)
        relative = (centroids - centroids.mean(1, keepdim=True)).to(operand.dtype)
        # The product is fast, and independent of the batch, as tokens x clusters; the maxima are fast with tokens last.
        products = torch.bmm(operand, relative.transpose(1, 2), out=self.products[:batch])
        scores = self.scores[:batch].copy_(products.transpose(1, 2).contiguous())
        if self.metric == "euclidean":
            scores.sub_(centroids.square().sum(2, keepdim=True) / 2)
        gap = scores.sub_(scores.amax(1, keepdim=True))  # 0 at the best, negative elsewhere
        best = torch.add(self.rank, gap, alpha=HUGE, out=gap).amax(1)
        return (self.k - best).long()


@dataclass(frozen=True)
class _FusedLloyd:
    """`_Lloyd` in one kernel. It has no restarts: images that need one are done again by the other."""

    shape: tuple[int, int, int]
    k: int
    metric: Metric
    products: torch.dtype
    device: torch.device

    def prepare(self, x: Float[Tensor, "batch tokens dim"], start: int) -> Float[Tensor, "batch tokens dim"]:
        """Tokens in their own type, or float32 ones of unit length; refuses what is not finite."""
        _demand_finite(x, start)
        return x if self.metric == "euclidean" else (values := x.float()) / _lengths(values)

    def run(
        self, values: Float[Tensor, "batch tokens dim"], first: Float[Tensor, "batch clusters dim"], iters: int
    ) -> tuple[Int64[Tensor, "batch tokens"], Float[Tensor, "batch clusters dim"]]:
        """Labels and centroids of `values`, from the `first` centroids."""
        exact = self.products == torch.float32
        labels, means, lost = fused_lloyd().lloyd(values, first, iters, spherical=self.metric == "cosine", exact=exact)
        if lost.any():
            again = values[lost].float()
            stepwise = _Lloyd((len(again), *self.shape[1:]), self.k, self.metric, self.products, self.device)
            labels[lost], means[lost] = stepwise.run(again, first[lost], iters)
        return labels, means


def _demand_finite(x: Float[Tensor, "batch tokens dim"], start: int) -> None:
    finite = torch.isfinite(x.sum((1, 2), dtype=torch.float32))  # isfinite of every value takes fifty times as long
    if not finite.all():
        raise ValueError(f"image {start + int(finite.int().argmin())} of the batch has tokens that are not finite")


def _move(
    sums: Float[Tensor, "rows clusters dim"],
    values: Float[Tensor, "batch tokens dim"],
    rows: Int64[Tensor, " rows"],
    old: Int64[Tensor, "rows tokens"],
    new: Int64[Tensor, "rows tokens"],
) -> None:
    """Bring the sums of the clusters of images `rows` from labels `old` (all -1: none yet) to `new`, in place.

    Only tokens that changed clusters are read: after the second iteration, a few in a hundred.
    """
    k, tokens = sums.shape[1], values.shape[1]
    every, flat = values.flatten(0, 1), sums.flatten(0, 1)
    if values.device.type != "cpu":
        sums.copy_(_one_hot_sums(values[rows], new, k))
    elif old[0, 0] < 0:
        flat.index_add_(0, (new + k * rows[:, None]).flatten(), every)
    else:
        at = (new != old).flatten().nonzero()[:, 0]
        row = at // tokens
        moved = every.index_select(0, at + (rows[row] - row) * tokens)
        came, left = (labels.flatten().index_select(0, at) + row * k for labels in (new, old))
        # NOTE: with alpha 1 torch takes a path that is fast for many rows and five times slower for few.
        flat.index_add_(0, left, moved, alpha=-1)
        flat.index_add_(0, came, moved.neg_(), alpha=-1)


def _one_hot_sums(
    values: Float[Tensor, "rows tokens dim"], labels: Int64[Tensor, "rows tokens"], k: int
) -> Float[Tensor, "rows clusters dim"]:
    clusters = torch.arange(k, device=labels.device)[:, None]
    return torch.bmm((labels[:, None] == clusters).to(values.dtype), values)


def _means(
    values: Float[Tensor, "batch tokens dim"],
    rows: Int64[Tensor, " rows"],
    labels: Int64[Tensor, "rows tokens"],
    sums: Float[Tensor, "rows clusters dim"],
    centroids: Float[Tensor, "rows clusters dim"],
    metric: Metric,
) -> Float[Tensor, "rows clusters dim"]:
    """Means of the clusters (scaled to unit length for cosine); empty ones restart, see `_restart`."""
    count, k, _ = sums.shape
    place = labels + k * torch.arange(count, device=labels.device)[:, None]
    sizes = torch.bincount(place.flatten(), minlength=count * k).view(count, k, 1)
    means = functional.normalize(sums, dim=2) if metric == "cosine" else sums / sizes.clamp_min(1)
    empty = sizes == 0
    if not empty.any():
        return means
    means = torch.where(empty, centroids, means)
    some = empty.any(1)[:, 0].nonzero()[:, 0]
    means[some] = _restart(values[rows[some]], labels[some], means[some], empty[some, :, 0])
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
    far, token = distance.sort(dim=1, descending=True, stable=True)
    turn = (empty.cumsum(1) - 1).clamp(0, min(means.shape[1], values.shape[1]) - 1)
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
