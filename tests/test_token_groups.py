"""Groupings without learning against scikit-learn, means against loops, and the memory of pictures."""

import warnings

import numpy as np
import pytest
import torch
from sklearn.cluster import MeanShift, estimate_bandwidth, spectral_clustering

from pipeline.nn.reading import Memory, checksums, fingerprint, seed_of
from pipeline.nn.token_groups import (
    LEAST_AFFINITY,
    group_means,
    in_reading_order,
    mean_distance,
    mean_shift,
    shrunk_colours,
    spectral,
)


def clustered(tokens: int, dim: int, centres: int, seed: int, noise: float = 0.4) -> torch.Tensor:
    """Unit vectors around some directions."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(centres, dim, generator=generator)
    x = means[torch.randint(centres, (tokens,), generator=generator)]
    return torch.nn.functional.normalize(x + noise * torch.randn(tokens, dim, generator=generator), dim=1)


def test_ids_are_contiguous_in_reading_order():
    assert in_reading_order(torch.tensor([7, 7, 2, 9, 2, 0])).tolist() == [0, 0, 1, 2, 1, 3]


@pytest.mark.parametrize("permuted", [False, True])
def test_group_means_equal_a_loop_and_move_with_their_ids(permuted):
    x, labels = clustered(40, 5, 4, 0), torch.randint(6, (40,), generator=torch.Generator().manual_seed(1))
    names = torch.randperm(6, generator=torch.Generator().manual_seed(2)) if permuted else torch.arange(6)
    found = group_means(x, names[labels])
    for group in range(6):
        rows = [x[i].numpy() for i in range(40) if labels[i] == group]
        np.testing.assert_allclose(found[names[group]].numpy(), np.mean(rows, axis=0), atol=1e-6)


@pytest.mark.parametrize(("tokens", "dim", "centres"), [(64, 128, 6), (50, 3, 4), (35, 16, 1), (5, 8, 2), (1, 4, 1)])
@pytest.mark.parametrize("noise", [0.1, 0.6])
def test_mean_shift_equals_scikit_learns(tokens, dim, centres, noise):
    x = clustered(tokens, dim, centres, tokens, noise)
    bandwidth = mean_distance(x, 0.2)
    if tokens > 5:
        assert bandwidth == pytest.approx(estimate_bandwidth(x.double().numpy(), quantile=0.2), rel=1e-6)
    for width in (max(bandwidth, 0.3), 0.5, 0.9):
        expected = MeanShift(bandwidth=width, max_iter=300).fit(x.double().numpy()).labels_
        assert torch.equal(mean_shift(x, width, 300), in_reading_order(torch.tensor(expected, dtype=torch.int64)))


def test_mean_shift_stops_after_its_iterations():
    x = clustered(64, 3, 8, 3, noise=0.5)
    expected = MeanShift(bandwidth=0.5, max_iter=1).fit(x.double().numpy()).labels_
    found = mean_shift(x, 0.5, 1)
    assert torch.equal(found, in_reading_order(torch.tensor(expected, dtype=torch.int64)))
    assert not torch.equal(found, mean_shift(x, 0.5, 300))


def test_equal_tokens_are_one_group_of_mean_shift():
    x = clustered(1, 16, 1, 0).expand(20, -1)
    assert mean_shift(x, mean_distance(x, 0.2), 300).tolist() == [0] * 20


@pytest.mark.parametrize("assign", ["cluster_qr", "discretize", "kmeans"])
def test_spectral_equals_scikit_learns_and_repeats(assign):
    x = clustered(64, 32, 6, 0)
    affinity = (x @ x.T).double()
    floored = affinity.clamp(min=LEAST_AFFINITY).numpy()
    expected = spectral_clustering(floored, n_clusters=8, assign_labels=assign, random_state=0)
    found = spectral(affinity.float(), 8, assign)
    assert torch.equal(found, in_reading_order(torch.tensor(expected, dtype=torch.int64)))
    assert torch.equal(found, spectral(affinity.float(), 8, assign))


def test_spectral_finds_planted_groups_in_any_order_of_tokens():
    x, order = clustered(60, 32, 4, 5, noise=0.1), torch.randperm(60, generator=torch.Generator().manual_seed(0))
    labels = spectral(x @ x.T, 4, "cluster_qr")
    assert labels.unique().tolist() == [0, 1, 2, 3]
    same = (x @ x.T) > 0.5
    assert torch.equal(labels[:, None] == labels[None], same)
    assert torch.equal(spectral(x[order] @ x[order].T, 4, "cluster_qr"), in_reading_order(labels[order]))


@pytest.mark.parametrize(
    ("tokens", "k", "groups"), [(1, 1, 1), (1, 8, 1), (5, 8, 5), (8, 8, 8), (9, 1, 1), (9, 8, None), (3, 2, None)]
)
def test_spectral_of_few_tokens(tokens, k, groups):
    x = clustered(tokens, 8, tokens, 1)
    labels = spectral(x @ x.T, k, "cluster_qr")
    assert labels.shape == (tokens,) and len(labels.unique()) <= k
    assert groups is None or len(labels.unique()) == groups


def test_spectral_of_a_picture_in_pieces_or_of_one_colour_warns_of_nothing():
    blocks = torch.block_diag(*[torch.ones(5, 5)] * 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert spectral(blocks, 3, "cluster_qr").tolist() == [0] * 5 + [1] * 5 + [2] * 5
        assert spectral(torch.ones(16, 16), 4, "cluster_qr").shape == (16,)


def test_shrunk_colours_are_means_of_areas():
    image = torch.randint(256, (12, 18, 3), generator=torch.Generator().manual_seed(0)).byte()
    found = shrunk_colours(image, 6)
    assert found.shape == (2, 3, 3) and shrunk_colours(image[:7, :13], 6).shape == (2, 3, 3)
    for row in range(2):
        for column in range(3):
            cell = image[6 * row : 6 * row + 6, 6 * column : 6 * column + 6].double().mean((0, 1)) / 255
            torch.testing.assert_close(found[row, column].double(), cell, atol=1e-6, rtol=0)


def test_memory_computes_once_and_forgets_the_oldest():
    memory, calls = Memory(3 * 40), []

    def recall(value: float) -> torch.Tensor:
        def compute():
            calls.append(value)
            return (torch.full((10,), float(value)),)

        return memory.recall(torch.full((2, 2), float(value)), compute)[0]

    assert [recall(v)[0].item() for v in (1, 2, 1, 3, 1)] == [1, 2, 1, 3, 1]
    assert calls == [1, 2, 3]
    recall(4)  # one too many: 2 is the one not used for longest
    recall(1), recall(3)
    assert calls == [1, 2, 3, 4]
    recall(2)
    assert calls == [1, 2, 3, 4, 2] and memory.size == 3 * 40


def test_checksums_tell_pictures_apart():
    """One bit of one value, two values that change places, and values that are only swapped between pictures."""
    x = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    bit, swapped = x.clone(), x.clone()
    bit.view(torch.int32)[0, 1, 2, 3] ^= 1
    swapped[0, 0, 0, 0], swapped[0, 2, 7, 7] = x[0, 2, 7, 7], x[0, 0, 0, 0]
    sums = checksums(torch.cat([x, bit, swapped, -x, x.clone()]))
    assert sums.shape == (5, 2) and torch.equal(sums[0], sums[4])
    for number in range(2):
        assert len(sums[:4, number].unique()) == 4, "each sum alone tells them apart"
    assert torch.equal(checksums(x)[0], sums[0]), "whatever stands beside it"


def test_a_fingerprint_knows_shapes_and_values():
    x = torch.arange(6.0)
    assert fingerprint(x) == fingerprint(x.clone()) != fingerprint(x.view(2, 3))
    assert fingerprint(x) != fingerprint(x + 1e-6) and seed_of(x) != seed_of(x + 1e-6)
    assert fingerprint(x.view(2, 3).T) == fingerprint(x.view(2, 3).T.contiguous())
