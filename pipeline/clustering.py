"""k-means of many small sets at once: the tokens of one image are one set, a batch holds many.

A CPU runs one compiled loop an image (`pipeline.compiled_kmeans`); a GPU one kernel, a program an image, for the
iterations (`pipeline.fused_lloyd`). What that kernel has no place for is done in plain steps of torch, which say what
all three do and to which the tests hold the others.

Same image, same result: every draw is a hash of (the image's seed, the draw's number), and every sum runs over one
image's tokens, in one order, whatever the batch or the number of threads (tests/test_clustering.py holds it). This is
so on one kind of machine; another CPU or a GPU rounds sums otherwise.

Axes: batch (images), tokens, dim, clusters, picks (tokens among which first centroids are drawn).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline import compiled_kmeans

Metric = Literal["cosine", "euclidean"]
Init = Literal["k-means++", "random"]

BLOCK_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}  # of tokens in float32 that are worked on at a time
# k-means++ draws first centroids among this many tokens per cluster, within bounds (their products are quadratic).
# Measured: 2, 4, 8 per cluster and all tokens end within 0.5 % of each other's objective, in no order.
PICKS_PER_CLUSTER, LEAST_PICKS, MOST_PICKS = 4, 64, 1024
SEEDED_TOGETHER = 4096  # images whose first centroids are drawn in one go, many small steps, on a GPU


@torch.no_grad()
def kmeans(
    x: Float[Tensor, "batch tokens dim"],
    k: int,
    *,
    iters: int,
    generator: torch.Generator | None = None,
    metric: Metric = "cosine",
    unit: bool = False,
    seeds: Int64[Tensor, " batch"] | None = None,
    init: Init = "k-means++",
    products: torch.dtype = torch.float32,
) -> tuple[Int64[Tensor, "batch tokens"], Float[Tensor, "batch clusters dim"]]:
    """Labels in [0, k) and float32 centroids of every image on its own.

    `iters` times at most: every token joins its nearest centroid, every centroid moves to the mean of its tokens. The
    labels are those of the last assignment and the centroids are their means. `unit`: tokens are scaled to unit length
    first. "cosine": they are, and centroids after each step as well (spherical k-means); a zero token has no direction
    and joins any cluster. "euclidean": squared distance.

    A cluster that lost all tokens restarts at the token farthest from its own centroid. Where every token lies on its
    centroid (fewer distinct tokens than k) it stays empty: its label does not occur, its centroid is where it was put.

    An image is finished when none of its tokens changes clusters. `seeds` has one seed per image, which makes results
    independent of the batch; without it they are drawn from `generator`. `products`: the type of the assignment's
    products on a GPU; everything else, and all on a CPU, is float32.

    Source: Lloyd 1982; k-means++, Arthur and Vassilvitskii 2007; restarts as faiss and scikit-learn do.
    Deviates: "k-means++" draws among 4k tokens (64 at least) spread evenly over the image, not among all: one small
    product matrix per image in place of k - 1 passes over the tokens. S-Seg card section 2 reads "L2, then Euclidean",
    means of unit tokens that are not scaled back: that is `unit` with metric "euclidean".

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
    unit = unit or metric == "cosine"
    labels = torch.empty(batch, tokens, dtype=torch.int64, device=x.device)
    centroids = torch.empty(batch, k, dim, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        picks, draws = _picks(seeds, tokens, k, init)
        if x.device.type != "cpu":
            for start in range(0, batch, SEEDED_TOGETHER):
                group = slice(start, start + SEEDED_TOGETHER)
                centroids[group] = _first_centroids(x[group], picks[group], draws[group], unit)
        size = max(1, BLOCK_BYTES[x.device.type] // (tokens * dim * 4))
        for start in range(0, batch, size):
            block = slice(start, start + size)
            if x.device.type == "cpu":
                tensors = (x[block], picks[block], draws[block], centroids[block], labels[block])
                _demand_finite(_compiled(*tensors, iters, unit, metric == "cosine"), start)
            else:
                values = _prepared(x[block], unit, start)
                iterate = _fused if fused_lloyd().fits(k, dim, x.device) else _steps
                labels[block], centroids[block] = iterate(values, centroids[block], iters, metric, products)
    return labels, centroids


def fused_lloyd() -> Any:
    """The kernel's module, which imports Triton: torch has it on Linux alone."""
    from pipeline import fused_lloyd

    return fused_lloyd


def _compiled(
    x: Tensor, picks: Tensor, draws: Tensor, centroids: Tensor, labels: Tensor, iters: int, unit: bool, spherical: bool
) -> list[bool]:
    """Fill in `centroids` and `labels`; which images were finite."""
    values = x if x.dtype in (torch.float16, torch.float32) else x.float()
    first, found = (picks.numpy(), draws.numpy()), (centroids.numpy(), labels.numpy())
    options = {"iters": iters, "unit": unit, "spherical": spherical, "threads": torch.get_num_threads()}
    return compiled_kmeans.kmeans(values.contiguous().numpy(), *first, *found, **options)


def _demand_finite(images: Sequence[bool], start: int) -> None:
    if not all(images):
        raise ValueError(f"image {start + images.index(False)} of the batch has tokens that are not finite")


def _picks(
    seeds: Int64[Tensor, " batch"], tokens: int, k: int, init: Init
) -> tuple[Int64[Tensor, "batch picks"], Float[Tensor, "batch draws"]]:
    """Tokens spread evenly over the image, and a draw in [0, 1) for each centroid; none for "random", whose first
    centroids are the picks."""
    count = k if init == "random" else min(tokens, max(k, LEAST_PICKS, min(PICKS_PER_CLUSTER * k, MOST_PICKS)))
    # One token from each of `count` equal stretches of the image: random, distinct where there are enough tokens.
    stretch = torch.arange(count, device=seeds.device) + _uniform(seeds, 0, count)
    draws = _uniform(seeds, count, 0 if init == "random" else k)
    return (stretch * (tokens / count)).long().clamp_max(tokens - 1), draws


def _first_centroids(
    x: Float[Tensor, "batch tokens dim"],
    picks: Int64[Tensor, "batch picks"],
    draws: Float[Tensor, "batch draws"],
    unit: bool,
) -> Float[Tensor, "batch clusters dim"]:
    """All picks, or as many of them as there are draws, far from each other (k-means++)."""
    (batch, tokens, dim), count, k = x.shape, picks.shape[1], draws.shape[1]
    rows = torch.arange(batch, device=x.device)
    place = picks + tokens * rows[:, None]
    picked = x.reshape(-1, dim).index_select(0, place.flatten()).view(batch, count, dim).float()
    if unit:
        picked /= _lengths(picked)
    if k == 0:
        return picked
    centred = picked - picked.mean(1, keepdim=True)
    product = torch.bmm(centred, centred.transpose(1, 2))
    square = product.diagonal(dim1=1, dim2=2)
    distance = (square[:, :, None] + square[:, None] - 2 * product).clamp_min_(0)
    chosen = torch.empty(batch, k, dtype=torch.int64, device=x.device)
    closest = torch.ones_like(square)  # the first centroid is any of the picks
    for j in range(k):
        total = closest.cumsum(1)
        # Where all weights are zero (fewer distinct tokens than k) this is the last pick, once more.
        chosen[:, j] = (total <= draws[:, j : j + 1] * total[:, -1:]).sum(1).clamp_max_(count - 1)
        to_chosen = distance[rows, chosen[:, j]]
        closest = to_chosen if j == 0 else torch.minimum(closest, to_chosen)
    return picked[rows[:, None], chosen]


def _lengths(values: Float[Tensor, "batch tokens dim"]) -> Float[Tensor, "batch tokens 1"]:
    """What to divide tokens by to make them of unit length: exactly 1 for those that are, so that they keep their
    bits whatever stands beside them; and for zeros a number that leaves them zero."""
    length = torch.linalg.vector_norm(values, dim=2, keepdim=True)
    return torch.where((length - 1).abs() > float(compiled_kmeans.UNIT_TOLERANCE), length, 1).clamp_min_(1e-30)


def _prepared(x: Float[Tensor, "batch tokens dim"], unit: bool, start: int) -> Float[Tensor, "batch tokens dim"]:
    """Float32 tokens of unit length, or tokens as they are; refuses what is not finite."""
    finite = torch.isfinite(x.sum((1, 2), dtype=torch.float32))  # isfinite of every value takes fifty times as long
    _demand_finite(finite.tolist(), start)
    return (values := x.float()) / _lengths(values) if unit else x


def _fused(
    values: Float[Tensor, "batch tokens dim"],
    first: Float[Tensor, "batch clusters dim"],
    iters: int,
    metric: Metric,
    products: torch.dtype,
) -> tuple[Int64[Tensor, "batch tokens"], Float[Tensor, "batch clusters dim"]]:
    """The GPU's kernel, if it fits. It has no restarts: images that need one are done again by the steps."""
    exact, fused = products == torch.float32, fused_lloyd()
    try:
        labels, means, lost = fused.lloyd(values, first, iters, spherical=metric == "cosine", exact=exact)
    except fused.OutOfResources:
        return _steps(values, first, iters, metric, products)
    if lost.any():
        labels[lost], means[lost] = _steps(values[lost], first[lost], iters, metric, products)
    return labels, means


def _steps(
    values: Float[Tensor, "batch tokens dim"],
    first: Float[Tensor, "batch clusters dim"],
    iters: int,
    metric: Metric,
    products: torch.dtype,
) -> tuple[Int64[Tensor, "batch tokens"], Float[Tensor, "batch clusters dim"]]:
    """Lloyd iterations of a whole batch, an operation of torch after another; a finished image stays as it is."""
    values = values.to(torch.promote_types(values.dtype, torch.float32))
    operand, centroids = values.to(products), first
    labels = torch.full(values.shape[:2], -1, dtype=torch.int64, device=values.device)
    for _ in range(iters):
        nearest = _nearest(operand, centroids, metric)
        if torch.equal(nearest, labels):
            break
        labels, centroids = nearest, _means(values, nearest, centroids, metric)
    return labels, centroids


def _nearest(
    operand: Float[Tensor, "batch tokens dim"], centroids: Float[Tensor, "batch clusters dim"], metric: Metric
) -> Int64[Tensor, "batch tokens"]:
    """The centroid with the largest score x.c (cosine) or x.c - |c|^2 / 2; the lowest index of equals.

    Scores are relative to the mean centroid, which changes no comparison and makes them small where tokens share a
    large common part, as a ViT's do: bfloat16 then rounds differences, not the common part.
    """
    relative = (centroids - centroids.mean(1, keepdim=True)).to(operand.dtype)
    scores = torch.bmm(operand, relative.transpose(1, 2)).float()
    if metric == "euclidean":
        scores -= centroids.square().sum(2)[:, None] / 2
    return scores.argmax(2)


def _means(
    values: Float[Tensor, "batch tokens dim"],
    labels: Int64[Tensor, "batch tokens"],
    centroids: Float[Tensor, "batch clusters dim"],
    metric: Metric,
) -> Float[Tensor, "batch clusters dim"]:
    """Means of the clusters (scaled to unit length for cosine); empty ones restart, see `_restart`.

    One-hot products for sums: scattering is not deterministic on a GPU.
    """
    clusters = torch.arange(centroids.shape[1], device=labels.device)[:, None]
    member = labels[:, None] == clusters
    sums, sizes = torch.bmm(member.to(values.dtype), values), member.sum(2, keepdim=True)
    scale = torch.linalg.vector_norm(sums, dim=2, keepdim=True) if metric == "cosine" else sizes
    means = torch.where(scale > 0, sums / scale, centroids)
    empty = sizes[:, :, 0] == 0
    return _restart(values, labels, means, empty) if empty.any() else means


def _restart(
    values: Float[Tensor, "batch tokens dim"],
    labels: Int64[Tensor, "batch tokens"],
    means: Float[Tensor, "batch clusters dim"],
    empty: Tensor,
) -> Float[Tensor, "batch clusters dim"]:
    """Put the i-th empty cluster on the i-th farthest token from its own mean, unless that lies on its mean."""
    own = means.gather(1, labels[:, :, None].expand(-1, -1, means.shape[2]))
    distance = (values - own).square().sum(2)
    distance[distance <= float(compiled_kmeans.ON_CENTROID) * values.square().sum(2)] = 0
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
