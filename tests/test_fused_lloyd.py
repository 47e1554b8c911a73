"""The GPU kernel of k-means: its steps in Triton's interpreter everywhere, the compiled kernel where there is a GPU."""

import pytest
import torch
from unchecked import run

INTERPRETED = """
import torch
import triton.language as tl
from pipeline import clustering, fused_lloyd

torch.manual_seed(0)
# 70 tokens: more than one tile, and a rest; 19 values and 5 clusters: less than the kernel's powers of two
x = torch.nn.functional.normalize(torch.randn(3, 70, 19) + torch.randn(19), dim=2)
x[2, :, :] = x[2, :1, :]  # tokens that are all the same: clusters stay empty
seeds = torch.arange(3)
for metric in ("euclidean", "cosine"):
    for iters in (1, 6, 50):
        first = clustering._first_centroids(x, *clustering._picks(seeds, 70, 5, "k-means++"), metric == "cosine")
        for exact in (True, False):
            labels, means, lost = fused_lloyd.lloyd(
                x, first, iters, spherical=metric == "cosine", exact=exact, factors=tl.float32
            )
            expected, centroids = clustering.kmeans(x[:2], 5, iters=iters, seeds=seeds[:2], metric=metric)
            assert torch.equal(labels[:2], expected), (metric, iters)
            torch.testing.assert_close(means[:2], centroids, atol=1e-6, rtol=0)
            assert lost.tolist() == [False, False, True]
print("equal")
"""


FITS = """
from pipeline.fused_lloyd import tile

assert tile(16, 384, 232_448) == 64, "an H200's shared memory"
assert tile(16, 384, 163_840) == 32 and tile(27, 384, 232_448) == 32
assert tile(27, 768, 232_448) == 0, "Triton asked for 264,192 bytes"
assert tile(33, 16, 10**9) == tile(2, 1025, 10**9) == 0
print("equal")
"""
GREEDY = """
import torch
from triton.runtime.errors import OutOfResources
from pipeline import clustering, fused_lloyd

tried = []


class Kernel:
    def __init__(self, most):
        self.most = most

    def __getitem__(self, grid):
        return self

    def __call__(self, values, centroids, labels, lost, *sizes, TILE, **options):
        tried.append(TILE)
        if TILE > self.most:
            raise OutOfResources(281_616, 232_448, "shared memory")
        labels.zero_()


x, first = torch.randn(2, 30, 8), torch.randn(2, 4, 8)
fused_lloyd._lloyd = Kernel(32)
assert not fused_lloyd.lloyd(x, first, 3, spherical=False, exact=True)[0].any() and tried == [64, 32]
fused_lloyd._lloyd = Kernel(0)
found = clustering._fused(x, first, 3, "euclidean", torch.float32)
expected = clustering._steps(x, first, 3, "euclidean", torch.float32)
assert tried[2:] == [64, 32] and all(map(torch.equal, found, expected))
print("equal")
"""
COMPILED = """
import torch
from pipeline import clustering
from pipeline.clustering import kmeans

for k, dim, dtype in ((16, 384, torch.float16), (27, 768, torch.bfloat16), (5, 19, torch.float32)):
    for metric in ("euclidean", "cosine"):
        generator = torch.Generator().manual_seed(0)
        groups = torch.randn(8, k, dim, generator=generator)
        x = groups[:, torch.arange(200) % k] + 0.5 * torch.randn(8, 200, dim, generator=generator) + 1
        x[3] = x[3, :1]  # needs restarts, which the kernel leaves to the steps
        x, seeds = x.cuda().to(dtype), torch.arange(8, device="cuda")
        labels, centroids = kmeans(x, k, iters=20, seeds=seeds, metric=metric)
        first = clustering._first_centroids(x, *clustering._picks(seeds, 200, k, "k-means++"), metric == "cosine")
        tokens = clustering._prepared(x, metric == "cosine", 0).float()
        expected, means = clustering._steps(tokens, first, 20, metric, torch.float32)
        same = (labels == expected).all(1)
        assert (labels == expected).float().mean() > 0.999 and same.any(), "but for ties"
        torch.testing.assert_close(centroids[same], means[same], atol=1e-4, rtol=1e-4)
        alone, _ = kmeans(x[5:6], k, iters=20, seeds=seeds[5:6], metric=metric)
        assert torch.equal(alone[0], labels[5]), "the same in any batch"
        halves, _ = kmeans(x, k, iters=20, seeds=seeds, metric=metric, products=torch.bfloat16)
        assert (halves == labels).float().mean() > 0.9
print("equal")
"""


def test_its_steps_are_those_of_the_cpu():
    pytest.importorskip("triton", reason="torch has Triton on Linux alone")
    run(INTERPRETED, TRITON_INTERPRET="1")


def test_what_does_not_fit_is_known_before_it_is_compiled():
    pytest.importorskip("triton", reason="torch has Triton on Linux alone")
    run(FITS)


def test_what_a_compiler_cannot_place_is_tried_with_a_smaller_tile_then_in_steps():
    pytest.importorskip("triton", reason="torch has Triton on Linux alone")
    run(GREEDY)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_compiled_it_equals_the_steps():
    run(COMPILED)
