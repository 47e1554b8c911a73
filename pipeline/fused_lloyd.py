"""Lloyd iterations of many small sets in one GPU kernel: a program per image, from the first centroids to the last.

An iteration reads the tokens once, for labels and sums alike, and writes no scores: what a GPU spends is reading 600 kB
an image and iteration (bfloat16, 784 x 384) out of its caches or memory. Programs end on their own when no label moves.

Products run on the matrix units in bfloat16 with sums in float32. A float32 number is taken as the sum of two bfloat16
ones (16 bits of mantissa together): clusters' sums always are products with both, scores where `exact` asks for it. One
program adds in one order, so that results do not depend on the batch.

Axes: batch (images), tokens, dim, clusters.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from triton.runtime.errors import OutOfResources

TILES = (64, 32)  # tokens that a program holds at a time; more are faster (measured on an H200: 64 by a half)
WARPS = 8
MOST_CLUSTERS, MOST_DIM = 32, 1024  # centroids and sums stay in registers
# Of shared memory: both parts of tokens and of centroids, in bfloat16, and a quarter for what the compiler adds. Triton
# asked for 264,192 bytes with a tile of 32, 32 clusters and 1,024 values, and for 360,448 with 128, 16 and 512.
BYTES_EACH = 5


def tile(k: int, dim: int, shared: int) -> int:
    """The largest tile that fits so many bytes of shared memory; 0 where none does."""
    if k > MOST_CLUSTERS or dim > MOST_DIM:
        return 0
    clusters, width = _padded(k), _padded(dim)
    return next((size for size in TILES if BYTES_EACH * width * (size + clusters) <= shared), 0)


def fits(k: int, dim: int, device: torch.device) -> bool:
    """Whether this GPU can hold a program's tokens and centroids of this shape."""
    return tile(k, dim, _shared(device)) > 0


def _shared(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _padded(count: int) -> int:
    return 1 << max(4, (count - 1).bit_length())  # a power of two, as blocks are; 16 at least, as the matrix units take


def lloyd(
    values: Shaped[Tensor, "batch tokens dim"],
    first: Float[Tensor, "batch clusters dim"],
    iters: int,
    *,
    spherical: bool,
    exact: bool,
    factors: Any = tl.bfloat16,
) -> tuple[Int64[Tensor, "batch tokens"], Float[Tensor, "batch clusters dim"], Tensor]:
    """Labels, float32 centroids, and which images (bool [batch]) lost a cluster's last token on the way.

    The latter are not to be used: this kernel restarts no cluster. `values` are finite, of any float type; `spherical`
    scales centroids to unit length and leaves their lengths out of the scores. `exact`: scores to about 16 bits of the
    factors' mantissas instead of 8. `factors`: the products' type; Triton's interpreter multiplies no bfloat16.

    Raises:
        OutOfResources: the compiler asks for more shared memory than there is, with the smallest tile too.
    """
    batch, tokens, dim = values.shape
    k = first.shape[1]
    labels = torch.full((batch, tokens), -1, dtype=torch.int32, device=values.device)
    centroids = first.float().clone(memory_format=torch.contiguous_format)
    lost = torch.zeros(batch, dtype=torch.int32, device=values.device)
    tensors = (values.contiguous(), centroids, labels, lost)
    options = {"SPHERICAL": spherical, "EXACT": exact, "FACTORS": factors, "DIM": _padded(dim), "CLUSTERS": _padded(k)}
    largest = tile(k, dim, _shared(values.device)) if values.is_cuda else TILES[0]
    with torch.cuda.device_of(values):
        for size in (size for size in TILES if size <= largest):
            try:
                _lloyd[(batch,)](*tensors, tokens, dim, k, iters, TILE=size, **options, num_warps=WARPS)  # type: ignore
                break
            except OutOfResources:  # another GPU's compiler adds more than was measured: a B200's at 64, 16 and 384
                if size == TILES[-1]:
                    raise
    return labels.long(), centroids, lost.bool()


@triton.jit
def _split(x, FACTORS: tl.constexpr):
    """A float32 number as the sum of two of half its size."""
    high = x.to(FACTORS)
    return high, (x - high.to(tl.float32)).to(FACTORS)


@triton.jit
def _lloyd(
    values,
    centroids,
    labels,
    lost,
    tokens,
    dim,
    k,
    iters,
    SPHERICAL: tl.constexpr,
    EXACT: tl.constexpr,
    FACTORS: tl.constexpr,
    TILE: tl.constexpr,
    DIM: tl.constexpr,
    CLUSTERS: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    values += image * tokens * dim
    labels += image * tokens
    d, c = tl.arange(0, DIM), tl.arange(0, CLUSTERS)
    place = centroids + image * k * dim + c[None, :] * dim + d[:, None]
    real = (d[:, None] < dim) & (c[None, :] < k)
    means = tl.load(place, mask=real, other=0.0)
    moved = 1
    iteration = 0
    any_lost = 0
    while (iteration < iters) & (moved > 0):
        # Relative to their mean: changes no comparison, and leaves small numbers to be rounded.
        relative = tl.where(real, means - (tl.sum(means, axis=1) / k)[:, None], 0.0)
        high_means, low_means = _split(relative, FACTORS)
        if SPHERICAL:
            bias = tl.where(c < k, 0.0, float("-inf"))
        else:
            bias = tl.where(c < k, -0.5 * tl.sum(means * means, axis=0), float("-inf"))
        sums = tl.zeros((DIM, CLUSTERS), dtype=tl.float32)
        sizes = tl.zeros((CLUSTERS,), dtype=tl.float32)
        moved = 0
        for start in range(0, tokens, TILE):
            t = start + tl.arange(0, TILE)
            there = t < tokens
            tile = tl.load(
                values + t[:, None] * dim + d[None, :], mask=there[:, None] & (d[None, :] < dim), other=0.0
            ).to(tl.float32)
            high, low = _split(tile, FACTORS)  # type: ignore
            scores = tl.dot(high, high_means)
            if EXACT:
                scores = tl.dot(low, high_means, scores)
                scores = tl.dot(high, low_means, scores)
            nearest = tl.argmax(scores + bias[None, :], axis=1)  # the lowest index of equals
            before = tl.load(labels + t, mask=there, other=0)
            moved += tl.sum(((nearest != before) & there).to(tl.int32), axis=0)
            tl.store(labels + t, nearest, mask=there)
            member = (nearest[:, None] == c[None, :]) & there[:, None]
            sizes += tl.sum(member.to(tl.float32), axis=0)
            sums = tl.dot(tl.trans(high), member.to(tl.float32).to(FACTORS), sums)
            sums = tl.dot(tl.trans(low), member.to(tl.float32).to(FACTORS), sums)
        any_lost += tl.sum(((sizes == 0.0) & (c < k)).to(tl.int32), axis=0)
        if SPHERICAL:
            means = sums / tl.maximum(tl.sqrt(tl.sum(sums * sums, axis=0)), 1e-12)[None, :]
        else:
            means = sums / tl.maximum(sizes, 1.0)[None, :]
        iteration += 1
        tl.debug_barrier()  # the labels are read by other threads than wrote them
    tl.store(place, means, mask=real)
    tl.store(lost + image, any_lost)
