"""k-means of one image after another in one compiled loop each: what a CPU runs.

Two things make it faster than float32's products alone would be. Tokens and centroids are rounded to 16 bits, of which
a CPU multiplies twice as many at a time: two rounded vectors are as far apart as the vectors are, give or take both
roundings. That tells which centroid is nearest for all but one or two tokens in a hundred, which float32 decides. And a
token that is much nearer to its own centroid than to any other is left alone until centroids have moved by as much: of
tokens like a ViT's a third over ten steps, more than half in the last. Results are to the last bit those of float32
throughout (tests/test_compiled_kmeans.py holds it).

Distances in float32 are differences, squared and summed: nothing cancels, whatever part the tokens have in common, and
a distance of zero is zero. Sums are corrected for the tokens that changed clusters.

Source: the bound is Hamerly's, Making k-means Even Faster, SDM 2010; the rounding is ours.
Axes: images, tokens, dim, clusters, picks (tokens among which first centroids are drawn).
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Int64
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from pipeline.int16_distances import (
    FEW,
    LANES,
    NOWHERE,
    RADIUS,
    TILE,
    VALUES,
    square_distances,
    square_distances_to_few,
    two_least,
)

UNIT_TOLERANCE = np.float32(1e-5)  # lengths this close to 1 are left alone, so that unit tokens keep their bits
# A token this close to its centroid (squared distance, as a share of its squared length) lies on it: rounding.
ON_CENTROID = np.float32(1e-9)
ONE_PLACE = np.float32(1e-15)  # tokens no farther apart are not told apart by rounded ones: squares run out of range
FAR = np.float32(np.inf)
# Digest of int16_distances.py: what numba keeps is renewed when this file changes, not when that one does.
INSTRUCTIONS = "1cf58ee45154"


def _compiler(*freedoms: str) -> Callable[[Callable], Any]:
    """A decorator; `freedoms` of float arithmetic, in LLVM's words. What it compiles is kept for the next process."""
    options: dict[str, Any] = {"nogil": True, "fastmath": set(freedoms)}

    def compiled(function: Callable) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:  # no place to keep it: a read-only checkout, and no home
            return njit(**options)(function)

    return compiled


# Sums may be reordered and fused, so that they run in vectors; those that are not finite are out by then.
_vectors = _compiler("reassoc", "contract", "arcp", "nsz", "nnan")
_any_number = _compiler("reassoc", "contract")


def kmeans(
    x: Float[np.ndarray, "images tokens dim"],
    picks: Int64[np.ndarray, "images picks"],
    draws: Float32[np.ndarray, "images draws"],
    centroids: Float32[np.ndarray, "images clusters dim"],
    labels: Int64[np.ndarray, "images tokens"],
    iters: int,
    *,
    unit: bool,
    spherical: bool,
    threads: int,
) -> list[bool]:
    """Fill in `centroids` and `labels`, as `pipeline.clustering.kmeans` says; which images were finite.

    x: float16 or float32, contiguous. `unit`: tokens are taken at unit length; `spherical`: centroids as well.
    First centroids are drawn among the tokens `picks`, one per draw in [0, 1); without draws they are the picks.
    """
    x = x.view(np.uint16) if x.dtype == np.float16 else x  # for which a CPU's numba has no type

    def run(i: int) -> bool:
        return _image(x[i], picks[i], draws[i], centroids[i], labels[i], iters, unit, spherical)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(run, range(len(x))))


def _widen(_typing, value):
    """A float32 as it is, a float16 (its bits in a uint16) as a float32: the instructions for one value."""

    def generate(_context, builder, _signature, arguments):
        if value == types.float32:
            return arguments[0]
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(value), generate


_wide: Any = intrinsic(_widen)


@_any_number
def _image(x, picks, draws, centroids, labels, iters, unit, spherical):
    """One image [tokens, dim]; False where it is not finite, whose results are void."""
    picked, _, finite = _tokens(x[picks], unit, np.zeros(x.shape[1], np.float32))
    if not finite:
        return False
    _draw(picked, draws, centroids)
    middle = _middle(centroids)
    tokens, reach, finite = _tokens(x, unit, middle)
    if finite:
        _lloyd(tokens, centroids, labels, iters, spherical, middle, reach)
    return finite


@_any_number
def _tokens(x, unit, middle):
    """Float32 tokens, how far the farthest is from `middle`, and whether all are finite, their squares as well.

    `unit`: they are scaled to unit length, except zeros and those that have it.
    """
    tokens, dim = x.shape
    wide = np.empty((tokens, dim), np.float32)
    total = farthest = np.float32(0)
    for t in range(tokens):
        square = np.float32(0)
        for d in range(dim):
            value = _wide(x[t, d])
            wide[t, d] = value
            square += value * value
        total += square
        length = np.sqrt(square)
        if unit and length > 0 and abs(length - 1) > UNIT_TOLERANCE:
            for d in range(dim):
                wide[t, d] /= length
        gap = np.float32(0)
        for d in range(dim):
            gap += (wide[t, d] - middle[d]) ** 2
        farthest = max(farthest, gap)
    return wide, np.sqrt(farthest), np.isfinite(total)


@_vectors
def _middle(centroids):
    """The mean of the first centroids [dim]: what tokens have in common, more or less."""
    middle = np.zeros(centroids.shape[1], np.float32)
    for k in range(len(centroids)):
        for d in range(len(middle)):
            middle[d] += centroids[k, d] / np.float32(len(centroids))
    return middle


@_vectors
def _square(x, t):
    total = np.float32(0)
    for d in range(x.shape[1]):
        total += x[t, d] ** 2
    return total


@_vectors
def _square_distance(x, t, y, k):
    total = np.float32(0)
    for d in range(x.shape[1]):
        gap = x[t, d] - y[k, d]
        total += gap * gap
    return total


@_vectors
def _draw(picked, draws, centroids):
    """First centroids: all tokens picked, or k-means++ among them, by the draws."""
    count = len(picked)
    weight = np.ones(count, np.float32)  # the first centroid is any of the picks
    for j in range(len(centroids)):
        if len(draws) == 0:
            centroids[j] = picked[j]
            continue
        running = np.cumsum(weight)
        # Where all weights are zero (fewer distinct tokens than k) this is the last pick, once more.
        chosen = min(np.searchsorted(running, draws[j] * running[-1], side="right"), count - 1)
        centroids[j] = picked[chosen]
        for i in range(count):
            square = _square_distance(picked, i, centroids, j)
            weight[i] = square if j == 0 else min(weight[i], square)


@_vectors
def _lloyd(x, centroids, labels, iters, spherical, middle, reach):
    """Move `centroids` from the first to the last ones and fill in `labels`.

    Neither a token nor a first centroid is farther from `middle` than `reach`.
    """
    tokens, dim = x.shape
    clusters = len(centroids)
    if spherical:  # centroids are of length 1, which the mean of unit tokens is not
        reach = max(reach, 1 + np.sqrt(_square(middle.reshape(1, dim), 0)))
    scale = np.float32(RADIUS) / reach if reach > ONE_PLACE else np.float32(0)
    rounded, squares = np.zeros((tokens, dim + -dim % VALUES), np.int16), np.empty(tokens, np.int32)
    for t in range(tokens - 1, -1, -1):  # the last ones are in the cache still
        squares[t] = _round(x, t, middle, scale, rounded, t)
    padded = -(-clusters // LANES) * LANES
    parts = 2 if clusters <= FEW else 1
    packed = np.zeros((padded // LANES, rounded.shape[1] // 2 // parts, LANES), np.int32)
    centroid_squares = np.full(padded, NOWHERE, np.int32)
    found = np.empty((TILE, padded), np.int32)
    doubt = np.float32(2 * np.sqrt(dim) + 1)  # of two distances, each between two vectors off by sqrt(dim) / 2 at most
    lead = np.zeros(tokens, np.float32)  # a token's own centroid is nearer than any other by this, at least; rounded
    queue = np.empty(tokens + TILE, np.int64)
    sums, sizes = np.zeros((clusters, dim), np.float32), np.zeros(clusters, np.int64)
    drift = np.zeros(clusters, np.float32)
    labels[:] = -1
    for _ in range(iters):
        _pack(centroids, middle, scale, parts, packed, centroid_squares)
        changed = 0
        for i in range(_queue(lead, labels, drift, queue)):
            if i % TILE == 0 and parts == 1:
                square_distances(queue, i, rounded, squares, packed, centroid_squares, found)
            elif i % TILE == 0:
                square_distances_to_few(queue, i, rounded, squares, packed, centroid_squares, found)
            least, first, second = two_least(found, i % TILE)
            t, new, distance = queue[i], np.int64(first), np.sqrt(np.float32(least))
            lead[t] = np.sqrt(np.float32(second)) - distance - doubt
            if lead[t] <= 0:
                new = _nearest(x, t, centroids, found[i % TILE], distance + doubt)
            old = labels[t]
            if new != old:
                changed += 1
                labels[t] = new
                sizes[new] += 1
                _add(sums, new, x, t, np.float32(1))
                if old >= 0:
                    sizes[old] -= 1
                    _add(sums, old, x, t, np.float32(-1))
        if changed == 0:
            return
        before = centroids.copy()
        _move(centroids, sums, sizes, spherical)
        if sizes.min() == 0:
            _restart(x, labels, centroids, sums, sizes)
        for k in range(clusters):
            drift[k] = np.sqrt(_square_distance(before, k, centroids, k)) * scale


@_vectors
def _round(x, t, middle, scale, out, row):
    """Token t less `middle`, times `scale`, in whole numbers, into a row of `out`; its squared length."""
    square = np.int32(0)
    for d in range(x.shape[1]):
        value = np.int32(np.rint((x[t, d] - middle[d]) * scale))
        out[row, d] = value
        square += value * value
    return square


@_vectors
def _pack(centroids, middle, scale, parts, packed, squares):
    """Round centroids as tokens are, and lay the pairs of their values side by side, two to an int32."""
    row = np.zeros((1, 2 * parts * packed.shape[1]), np.int16)
    pairs = row.view(np.int32)
    for k in range(len(centroids)):
        squares[k] = _round(centroids, k, middle, scale, row, 0)
        for part in range(parts):
            for p in range(packed.shape[1]):
                packed[k // LANES, p, k * parts % LANES + part] = pairs[0, p * parts + part]


@_vectors
def _queue(lead, labels, drift, queue):
    """Take from `lead` what centroids moved by, and queue tokens that have none left: how many these are.

    Before the first step nobody has any. The last token stands `TILE` times more, which makes the last tile whole.
    """
    most = drift.max()
    count = 0
    for t in range(len(lead)):  # without a branch
        lead[t] -= drift[labels[t]] + most
        queue[count] = t
        count += lead[t] <= 0
    if count > 0:
        queue[count : count + TILE] = queue[count - 1]
    return count


@_vectors
def _nearest(x, t, centroids, rounded, limit):
    """The token's nearest centroid, the lowest index of equals, among those no farther than `limit` when rounded."""
    best, nearest = FAR, 0
    for k in range(len(centroids)):
        if np.sqrt(np.float32(rounded[k])) <= limit:
            square = _square_distance(x, t, centroids, k)
            if square < best:
                best, nearest = square, k
    return nearest


@_vectors
def _add(sums, k, x, t, sign):
    for d in range(x.shape[1]):
        sums[k, d] += sign * x[t, d]


@_vectors
def _move(centroids, sums, sizes, spherical):
    """Centroids to the means of their clusters; those of empty ones stay, and so does a direction that cancels out."""
    for k in range(len(centroids)):
        size = np.sqrt(_square(sums, k)) if spherical else np.float32(sizes[k])
        if sizes[k] > 0 and size > 0:
            for d in range(sums.shape[1]):
                centroids[k, d] = sums[k, d] / size


@_vectors
def _restart(x, labels, centroids, sums, sizes):
    """Put the i-th empty cluster on the i-th farthest token from its own mean, unless that lies on its mean."""
    far = np.empty(len(x), np.float32)
    for t in range(len(x)):
        square = _square_distance(x, t, centroids, labels[t])
        far[t] = square if square > ON_CENTROID * _square(x, t) else np.float32(0)
    for k in range(len(centroids)):
        if sizes[k] == 0:
            sums[k] = 0
            target = np.argmax(far)
            if far[target] > 0:
                centroids[k] = x[target]
                far[target] = 0
