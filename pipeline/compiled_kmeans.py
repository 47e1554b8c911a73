"""k-means of one image after another in one compiled loop each: what a CPU runs.

Most distances are never computed. Two bounds say where the nearest centroid cannot have changed: how far a token is
from its own centroid at most, and from each other one at least; a centroid that moves by so much loosens them by so
much. On a ViT's tokens the second step still needs nearly all distances, those after it one in seven. In torch
gathering the tokens that are left costs what skipping the others saves (reports/log.md); here they are read where they
lie.

Distances are differences, squared and summed in float32: nothing cancels, whatever part the tokens have in common, and
a distance of zero is zero. Sums are corrected for the tokens that changed clusters.

Source: Elkan, Using the Triangle Inequality to Accelerate k-Means, ICML 2003, without the distances between centroids.
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

WHOLE_STEPS = 2  # steps that compute every distance, in tiles; bounds would save less than tiles do
ROUNDING = np.float32(1.00001)  # bounds are sums of rounded numbers: what they leave out by less than this is computed
UNIT_TOLERANCE = np.float32(1e-5)  # lengths this close to 1 are left alone, so that unit tokens keep their bits
# A token this close to its centroid (squared distance, as a share of its squared length) lies on it: rounding.
ON_CENTROID = np.float32(1e-9)
FAR = np.float32(np.inf)


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
    tokens, finite = _tokens(x, unit)
    if finite:
        _draw(tokens, picks, draws, centroids)
        _lloyd(tokens, centroids, labels, iters, spherical)
    return finite


@_any_number
def _tokens(x, unit):
    """Float32 tokens and whether all are finite; of unit length, except zeros and those that have it, if so asked."""
    tokens, dim = x.shape
    wide = np.empty((tokens, dim), np.float32)
    total = np.float32(0)
    for t in range(tokens):
        square = np.float32(0)
        for d in range(dim):
            value = _wide(x[t, d])
            wide[t, d] = value
            total += value
            square += value * value
        length = np.sqrt(square)
        if unit and length > 0 and abs(length - 1) > UNIT_TOLERANCE:
            for d in range(dim):
                wide[t, d] /= length
    return wide, np.isfinite(total)


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
def _draw(x, picks, draws, centroids):
    """First centroids: all picks, or k-means++ among them, by the draws."""
    count = len(picks)
    weight = np.ones(count, np.float32)  # the first centroid is any of the picks
    for j in range(len(centroids)):
        if len(draws) == 0:
            centroids[j] = x[picks[j]]
            continue
        running = np.cumsum(weight)
        # Where all weights are zero (fewer distinct tokens than k) this is the last pick, once more.
        chosen = picks[min(np.searchsorted(running, draws[j] * running[-1], side="right"), count - 1)]
        centroids[j] = x[chosen]
        for i in range(count):
            square = _square_distance(x, picks[i], centroids, j)
            weight[i] = square if j == 0 else min(weight[i], square)


@_vectors
def _lloyd(x, centroids, labels, iters, spherical):
    """Move `centroids` from the first to the last ones and fill in `labels`."""
    tokens, dim = x.shape
    clusters = len(centroids)
    own = np.empty(tokens, np.float32)  # at most this far from its own centroid
    others = np.empty((tokens, clusters), np.float32)  # at least this far from each other one; own: infinite
    nearest_other = np.empty(tokens, np.float32)
    sums, sizes = np.zeros((clusters, dim), np.float32), np.zeros(clusters, np.int64)
    drift, candidates = np.empty(clusters, np.float32), np.empty(clusters + 1, np.int64)
    labels[:] = -1
    for step in range(iters):
        if step < WHOLE_STEPS:
            _all_distances(x, centroids, others)
        else:
            _loosen(others, drift, nearest_other)
        changed = 0
        for t in range(tokens):
            old = labels[t]
            if step < WHOLE_STEPS:
                new = np.argmin(others[t])
                own[t] = others[t, new]
            else:
                own[t] = (own[t] + drift[old]) * ROUNDING
                if nearest_other[t] > own[t]:
                    continue
                own[t] = np.sqrt(_square_distance(x, t, centroids, old))
                if nearest_other[t] > own[t] * ROUNDING:
                    continue
                new = _nearest(x, t, centroids, old, own, others, candidates)
            others[t, new] = FAR
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
            drift[k] = np.sqrt(_square_distance(before, k, centroids, k))


@_vectors
def _all_distances(x, centroids, out):
    """Every token's distance to every centroid, into `out` [tokens, clusters]."""
    tokens, clusters = len(x), len(centroids)
    for t in range(0, tokens - 1, 2):
        for k in range(0, clusters - 3, 4):
            _tile(x, t, centroids, k, out)
        for k in range(clusters - clusters % 4, clusters):
            out[t, k] = _square_distance(x, t, centroids, k)
            out[t + 1, k] = _square_distance(x, t + 1, centroids, k)
    if tokens % 2:
        for k in range(clusters):
            out[tokens - 1, k] = _square_distance(x, tokens - 1, centroids, k)
    for t in range(tokens):
        for k in range(clusters):
            out[t, k] = np.sqrt(out[t, k])


@_vectors
def _tile(x, t, centroids, k, out):
    """Squared distances of two tokens to four centroids: eight sums in registers for six numbers read."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    for d in range(x.shape[1]):
        a, b = x[t, d], x[t + 1, d]
        c0, c1, c2, c3 = centroids[k, d], centroids[k + 1, d], centroids[k + 2, d], centroids[k + 3, d]
        a0 += (a - c0) ** 2
        a1 += (a - c1) ** 2
        a2 += (a - c2) ** 2
        a3 += (a - c3) ** 2
        b0 += (b - c0) ** 2
        b1 += (b - c1) ** 2
        b2 += (b - c2) ** 2
        b3 += (b - c3) ** 2
    out[t, k], out[t, k + 1], out[t, k + 2], out[t, k + 3] = a0, a1, a2, a3
    out[t + 1, k], out[t + 1, k + 1], out[t + 1, k + 2], out[t + 1, k + 3] = b0, b1, b2, b3


@_vectors
def _loosen(others, drift, nearest_other):
    """Bring the lower bounds up to date with centroids that moved by `drift`."""
    tokens, clusters = others.shape
    for t in range(tokens):
        least = FAR
        for k in range(clusters):
            bound = others[t, k] - drift[k]
            others[t, k] = bound
            least = min(least, bound)
        nearest_other[t] = least


@_vectors
def _nearest(x, t, centroids, old, own, others, candidates):
    """The token's nearest centroid, the lowest index of equals; `own[t]` is the exact distance to `old`.

    Leaves the exact distances it computed in `others` and `own`. `candidates` [clusters + 1] is room to work in.
    """
    new, best = old, own[t]
    count = 0
    for k in range(len(centroids)):  # without a branch
        candidates[count] = k
        count += others[t, k] <= best * ROUNDING
    others[t, old] = best
    for k in candidates[:count]:
        if others[t, k] <= best * ROUNDING:
            distance = np.sqrt(_square_distance(x, t, centroids, k))
            others[t, k] = distance
            if distance < best or (distance == best and k < new):
                new, best = k, distance
    own[t] = best
    return new


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
