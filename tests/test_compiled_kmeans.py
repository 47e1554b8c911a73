"""The compiled loop of k-means: to the last bit what float32 throughout gives, on CPUs of any vectors."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from kmeans_cases import METRICS, compiled, data, first_centroids, seeds, steps
from numba import njit
from torch import Tensor

from pipeline import clustering, compiled_kmeans, int16_distances


@njit
def lloyd_in_float32(x, centroids, labels, iters, spherical):
    """The compiled loop's arithmetic with every distance in float32, all of them in every step."""
    sums, sizes = np.zeros_like(centroids), np.zeros(len(centroids), np.int64)
    square = np.empty(len(centroids), np.float32)
    labels[:] = -1
    for _ in range(iters):
        changed = 0
        for t in range(len(x)):
            for k in range(len(centroids)):
                square[k] = compiled_kmeans._square_distance(x, t, centroids, k)
            old, new = labels[t], np.argmin(square)
            if new != old:
                changed += 1
                labels[t] = new
                sizes[new] += 1
                compiled_kmeans._add(sums, new, x, t, np.float32(1))
                if old >= 0:
                    sizes[old] -= 1
                    compiled_kmeans._add(sums, old, x, t, np.float32(-1))
        if changed == 0:
            break
        compiled_kmeans._move(centroids, sums, sizes, spherical)
        if sizes.min() == 0:
            compiled_kmeans._restart(x, labels, centroids, sums, sizes)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize(("tokens", "k"), [(1, 3), (50, 16), (300, 27)])
def test_the_compiled_loop_draws_the_same_first_centroids(metric, init, tokens, k):
    x = data(5, tokens, 19)
    picks, draws = clustering._picks(seeds(5), tokens, k, init)
    found = torch.empty(5, k, 19)
    for i in range(5):
        picked = x[i, picks[i]].numpy()
        picked, _, _ = compiled_kmeans._tokens(picked, metric == "cosine", np.zeros(19, np.float32))
        compiled_kmeans._draw(picked, draws[i].numpy(), found[i].numpy())
    torch.testing.assert_close(found, first_centroids(x, k, init, metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("tokens", "dim", "k"), [(1, 1, 1), (33, 3, 6), (64, 48, 8), (97, 33, 27), (784, 384, 16)])
@pytest.mark.parametrize("iters", [1, 2, 3, 10, 100])
def test_the_compiled_loop_skips_no_distance_that_matters(metric, tokens, dim, k, iters):
    """Against the steps, which compute all of them; noise alone, so that tokens lie between clusters."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(3, tokens, dim, generator=generator) + 1
    if metric == "cosine":
        x = torch.nn.functional.normalize(x, dim=2)
    first = first_centroids(x, k, metric=metric)
    labels, centroids = compiled(x, first, iters, metric)
    expected, means = steps(x.double(), first.double(), iters, metric)
    assert torch.equal(labels, expected)
    torch.testing.assert_close(centroids, means.float(), atol=1e-5, rtol=1e-5)


def spread(x: Tensor) -> Tensor:
    return x


def far_from_the_origin(x: Tensor) -> Tensor:
    return x + 1e4


def with_one_far_token(x: Tensor) -> Tensor:
    """The others are rounded to nearly the same numbers."""
    return torch.cat([x[:, :-1], x[:, -1:] * 1e5], 1)


def with_copies(x: Tensor) -> Tensor:
    """Equal distances everywhere."""
    return (x / 4).round()


def tiny(x: Tensor) -> Tensor:
    return x * 1e-20


@pytest.mark.parametrize("kind", [spread, far_from_the_origin, with_one_far_token, with_copies, tiny])
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("tokens", "dim", "k"), [(7, 1, 1), (90, 5, 15), (150, 48, 16), (99, 33, 17), (300, 768, 40)])
def test_rounded_distances_decide_as_float32_does(kind, metric, tokens, dim, k):
    """To the last bit, whatever the tokens: random first centroids among them."""
    x = kind(torch.randn(2, tokens, dim, generator=torch.Generator().manual_seed(dim)))
    if metric == "cosine":
        x = torch.nn.functional.normalize(x, dim=2, eps=1e-30)
    first = first_centroids(x, k, "random")
    for iters in (1, 2, 4, 30):
        labels, centroids = compiled(x, first, iters, metric)
        means, expected = first.clone(), torch.empty_like(labels)
        for i in range(2):
            lloyd_in_float32(x[i].numpy(), means[i].numpy(), expected[i].numpy(), iters, metric == "cosine")
        assert torch.equal(labels, expected) and torch.equal(centroids, means)


@pytest.mark.skipif(
    int16_distances.LANES == 8, reason="this CPU's vectors are that short: every other test is this one"
)
def test_a_cpu_of_shorter_vectors_decides_the_same():
    """The test above once more, compiled for vectors of 256 bits."""
    again = "import sys, pytest; from pipeline import int16_distances; assert int16_distances.LANES == 8; "
    again += f"sys.exit(pytest.main([{__file__!r}, '-k', 'rounded_distances']))"
    features = "+64bit,+sse2,+sse4.2,+avx,+avx2,+fma,+f16c,+bmi,+bmi2,+popcnt,+cx16,+cmov,+fxsr,+mmx"
    environment = os.environ | {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": features}
    told = subprocess.run([sys.executable, "-c", again], env=environment, capture_output=True, text=True, timeout=300)
    assert told.returncode == 0, told.stdout[-2000:] + told.stderr[-2000:]


def test_compiles_where_nothing_can_be_kept(monkeypatch):
    def homeless(*, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function")
        return njit(**options)

    monkeypatch.setattr(compiled_kmeans, "njit", homeless)
    assert compiled_kmeans._compiler()(lambda x: x + 1)(2) == 3


def test_compiled_code_is_renewed_with_its_instructions():
    source = Path(int16_distances.__file__).read_bytes()
    assert compiled_kmeans.INSTRUCTIONS == hashlib.sha256(source).hexdigest()[:12], "write the digest there"
