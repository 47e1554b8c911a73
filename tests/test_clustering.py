"""k-means: a plain loop, hand-counted empty clusters, and the same bits for an image in any batch."""

import numpy as np
import pytest
import torch
from kmeans_cases import METRICS, compiled, data, first_centroids, seeds, steps
from torch import Tensor

from pipeline import clustering
from pipeline.clustering import kmeans


def plain_lloyd(x: np.ndarray, centroids: np.ndarray, iters: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """One image, loops and float64; no cluster may run empty."""
    if metric == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    for _ in range(iters):
        labels = np.array([int(np.argmin([((token - c) ** 2).sum() for c in centroids])) for token in x])
        centroids = np.stack([x[labels == j].mean(0) for j in range(len(centroids))])
        if metric == "cosine":
            centroids = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    return labels, centroids


ITERATIONS = pytest.mark.parametrize("lloyd", [steps, compiled])


def objective(x: Tensor, centroids: Tensor) -> Tensor:
    """Mean over images of the squared distances to the nearest centroid."""
    return torch.cdist(x.double(), centroids.double()).square().amin(2).sum(1).mean()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("init", ["k-means++", "random"])
@pytest.mark.parametrize("iters", [1, 4, 30])
def test_equals_a_plain_loop(metric, init, iters):
    x = data(6)
    labels, centroids = kmeans(x, 4, iters=iters, metric=metric, init=init, seeds=seeds(6))
    first = first_centroids(x, 4, init, metric)
    for i in range(6):
        expected, means = plain_lloyd(x[i].double().numpy(), first[i].double().numpy(), iters, metric)
        np.testing.assert_array_equal(labels[i].numpy(), expected)
        np.testing.assert_allclose(centroids[i].numpy(), means, atol=1e-5)


def test_first_centroids_are_drawn_by_squared_distance():
    """k-means++ against a loop over the same draws; of 30 tokens all are picks, in order."""
    x, k = data(4, tokens=30), 5
    chosen = first_centroids(x, k)
    draws = clustering._uniform(seeds(4), 30, k).double().numpy()
    for i, tokens in enumerate(x.double().numpy()):
        weight, picked = np.ones(30), []
        for j in range(k):
            place = int(np.searchsorted(np.cumsum(weight), draws[i, j] * weight.sum(), side="right"))
            picked.append(place)
            weight = np.minimum(weight if j else np.inf, ((tokens - tokens[place]) ** 2).sum(1))
        np.testing.assert_array_equal(chosen[i].numpy(), x[i, picked].numpy())


def test_first_centroids_are_distinct_tokens_spread_over_the_image():
    x = torch.arange(100.0)[None, :, None].expand(50, -1, 1)
    for init in ("random", "k-means++"):
        first = first_centroids(x, 10, init)[:, :, 0].sort(1).values
        assert (first.diff(dim=1) > 0).all(), init
    assert len(first.unique()) > 90  # k-means++ reaches every token


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "dim", "k"), [(64, 48, 8), (49, 33, 5), (196, 384, 16)])
def test_same_bits_in_any_batch(metric, products, tokens, dim, k, monkeypatch):
    """Alone, in a batch, at another place in it, in blocks of other sizes, with other numbers of threads."""
    batch = 9
    x = data(batch, tokens, dim)

    def run(which: Tensor) -> tuple[Tensor, Tensor]:
        options = {"iters": 10, "metric": metric, "products": products}
        return kmeans(x[which], k, seeds=seeds(batch)[which], **options)

    together = run(torch.arange(batch))
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(1))
    for which in (order, order[:4], *torch.arange(batch).split(1)):
        for whole, part in zip(together, run(which), strict=True):
            assert torch.equal(whole[which], part)
    monkeypatch.setitem(clustering.BLOCK_BYTES, "cpu", 2 * tokens * dim * 4)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            for whole, part in zip(together, run(torch.arange(batch)), strict=True):
                assert torch.equal(whole, part)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("metric", METRICS)
def test_objective_falls_and_a_finished_image_stays(metric):
    x = torch.nn.functional.normalize(data(8, 120, 12), dim=2)
    results = [kmeans(x, 6, iters=n, metric=metric, seeds=seeds(8)) for n in (1, 2, 4, 8, 100, 200)]
    falls = [float(objective(x, centroids)) for _, centroids in results]
    assert falls[0] > falls[-1] * 1.001
    assert all(later <= earlier + 1e-4 for earlier, later in zip(falls, falls[1:], strict=False))
    for before, after in zip(results[-2], results[-1], strict=True):
        assert torch.equal(before, after)


def test_as_good_as_scikit_learn_and_bfloat16_as_float32():
    from sklearn.cluster import KMeans

    x = data(24, 200, 32)
    ours = {
        products: objective(x, kmeans(x, 8, iters=10, metric="euclidean", seeds=seeds(24), products=products)[1])
        for products in (torch.float32, torch.bfloat16)
    }
    peers = [KMeans(8, n_init=1, max_iter=10, random_state=0).fit(image.numpy()).cluster_centers_ for image in x]
    theirs = objective(x, torch.from_numpy(np.stack(peers)))
    assert ours[torch.float32] <= 1.02 * theirs
    assert ours[torch.bfloat16] <= 1.01 * ours[torch.float32]


def test_means_belong_to_the_labels():
    x = data(5)
    labels, centroids = kmeans(x, 4, iters=3, metric="euclidean", seeds=seeds(5))
    for i in range(5):
        for j in labels[i].unique():
            torch.testing.assert_close(centroids[i, j], x[i, labels[i] == j].mean(0))
    assert torch.allclose(kmeans(x, 4, iters=3, seeds=seeds(5))[1].norm(dim=2), torch.ones(5, 4))


@ITERATIONS
def test_empty_clusters_restart_at_the_farthest_tokens(lloyd):
    """Tokens 0 1 2 3 and 20; three of four first centroids so far away that they win nothing."""
    x = torch.tensor([0.0, 1, 2, 3, 20])[None, :, None]
    first = torch.tensor([0.0, 1e4, 2e4, 3e4])[None, :, None]
    labels, centroids = lloyd(x, first, 1)
    assert labels.tolist() == [[0] * 5]
    # mean 5.2; by distance from it: 20 (14.8), 0 (5.2), 1 (4.2)
    assert centroids[0, :, 0].tolist() == pytest.approx([5.2, 20, 0, 1])
    labels, centroids = lloyd(x, first, 20)
    assert len(labels.unique()) == 4 and objective(x, centroids) <= 0.5 + 1e-6


@ITERATIONS
def test_restart_leaves_other_images_alone(lloyd):
    x = data(3)
    first = first_centroids(x, 4, "random")
    first[1, 2] = 1e3
    labels, centroids = lloyd(x, first, 6)
    for i in range(3):
        alone = lloyd(x[i : i + 1], first[i : i + 1], 6)
        assert torch.equal(alone[0][0], labels[i]) and torch.equal(alone[1][0], centroids[i])
    assert len(labels[1].unique()) == 4


@ITERATIONS
def test_a_direction_that_cancels_out_stays(lloyd):
    """Two opposite tokens in one cluster have no mean direction."""
    x = torch.tensor([[[1.0, 0], [-1, 0], [0, 1]]])
    first = torch.tensor([[[0.0, -1], [0, 1]]])
    labels, centroids = lloyd(x, first, 1, "cosine")
    assert labels.tolist() == [[0, 0, 1]] and torch.equal(centroids, first)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 6, 300])
def test_fewer_distinct_tokens_than_clusters(metric, products, tokens):
    """Three distinct tokens, many copies: each gets a label of its own, the other labels stay unused."""
    distinct = torch.eye(3) + 0.5
    x = distinct[torch.arange(tokens) % 3].expand(4, -1, -1).contiguous()
    labels, centroids = kmeans(x, 5, iters=10, metric=metric, seeds=seeds(4), products=products)
    assert torch.isfinite(centroids).all()
    for row in labels:
        assert len(row.unique()) == min(tokens, 3)
        assert all(len(row[i::3].unique()) == 1 for i in range(min(tokens, 3)))


@pytest.mark.parametrize("metric", METRICS)
def test_all_tokens_equal_and_zero(metric):
    for value in (0.0, 2.0):
        labels, centroids = kmeans(torch.full((2, 9, 4), value), 3, iters=5, metric=metric, seeds=seeds(2))
        assert all(len(row.unique()) == 1 for row in labels) and torch.isfinite(centroids).all()


def test_permuted_images_and_channels():
    x = data(6)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    labels, centroids = kmeans(x, 4, iters=10, seeds=seeds(6))
    moved, means = kmeans(x[order], 4, iters=10, seeds=seeds(6)[order])
    assert torch.equal(moved, labels[order]) and torch.equal(means, centroids[order])
    turned, _ = kmeans(x.flip(2), 4, iters=10, seeds=seeds(6))
    assert torch.equal(turned, labels)


def test_scale_does_not_matter_to_cosine():
    x = data(4)
    lengths = torch.rand(4, 60, 1, generator=torch.Generator().manual_seed(2)) * 9 + 1
    assert torch.equal(kmeans(x, 4, iters=10, seeds=seeds(4))[0], kmeans(x * lengths, 4, iters=10, seeds=seeds(4))[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unit_scales_tokens_and_leaves_means(dtype):
    x = (data(4) * 3).to(dtype)
    labels, centroids = kmeans(x, 4, iters=10, metric="euclidean", unit=True, seeds=seeds(4))
    scaled = torch.nn.functional.normalize(x.float(), dim=2)
    expected, means = kmeans(scaled, 4, iters=10, metric="euclidean", seeds=seeds(4))
    assert torch.equal(labels, expected)
    torch.testing.assert_close(centroids, means)


def test_the_steps_add_halves_in_float32():
    x = data(3, 400).half()
    first = first_centroids(x, 4)
    for half, wide in zip(steps(x, first, 10), steps(x.float(), first, 10), strict=True):
        assert torch.equal(half, wide)


def test_half_precision_strided_and_autocast_inputs():
    x = data(4).half()
    labels, centroids = kmeans(x.float(), 4, iters=10, seeds=seeds(4))
    assert torch.equal(kmeans(x, 4, iters=10, seeds=seeds(4))[1], centroids)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(kmeans(strided, 4, iters=10, seeds=seeds(4))[1], centroids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(kmeans(x, 4, iters=10, seeds=seeds(4))[1], centroids)


def test_bad_input_is_refused():
    for value in (float("nan"), float("inf")):
        x = data(20, 1000, 200)
        x[17, 3, 2] = value
        with pytest.raises(ValueError, match="image 17 of the batch"):
            kmeans(x, 4, iters=2, seeds=seeds(20))
    for k, iters in ((0, 1), (2, 0)):
        with pytest.raises(ValueError, match="positive"):
            kmeans(data(1), k, iters=iters, seeds=seeds(1))
    with pytest.raises(ValueError, match="generator"):
        kmeans(data(1), 2, iters=1)


def test_generator_decides():
    x = data(5)
    first, again, other = (kmeans(x, 4, iters=1, generator=torch.Generator().manual_seed(s))[0] for s in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_no_images():
    labels, centroids = kmeans(torch.empty(0, 9, 3), 2, iters=1, seeds=torch.empty(0, dtype=torch.int64))
    assert labels.shape == (0, 9) and centroids.shape == (0, 2, 3)


def test_draws_are_splitmix64():
    def plain(seed: int, number: int) -> float:
        mask = 2**64 - 1

        def mix(z: int) -> int:
            z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
            z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
            return z ^ (z >> 31)

        return (mix((mix(seed & mask) + number * 0x9E3779B97F4A7C15) & mask) >> 40) / 2**24

    found = clustering._uniform(torch.tensor([-3, 0, 2**62]), 5, 4)
    expected = [[plain(seed, number) for number in range(6, 10)] for seed in (-3, 0, 2**62)]
    assert found.tolist() == expected
    many = clustering._uniform(torch.arange(200), 0, 500)
    assert 0 <= many.min() and many.max() < 1
    assert abs(many.mean() - 0.5) < 0.005 and abs(many.var() - 1 / 12) < 0.002
