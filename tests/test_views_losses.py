"""ZeroSeg's losses against plain loops, and where their gradients go."""

import pytest
import torch

from pipeline.losses.views import distinct_tiles, match_loss, multi_scale_loss, reconstruction_loss, view_weights

SCALES = (1, 2, 3, 4)


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def distance(one: torch.Tensor, other: torch.Tensor, over_dims: str) -> float:
    parts = [abs(float(a) - float(b)) for a, b in zip(one, other, strict=True)]
    return sum(parts) / (len(parts) if over_dims == "mean" else 1)


def test_view_weights_by_hand():
    assert view_weights((1, 2), "sum").tolist() == [1, 1, 1, 1, 1]
    assert view_weights((1, 2), "mean").tolist() == pytest.approx([0.2] * 5)
    assert view_weights((1, 2), "scale_mean").tolist() == pytest.approx([0.5] + [0.125] * 4)
    weights = view_weights(SCALES, "scale_mean")
    assert len(weights) == 30 and weights[1:5].sum().item() == pytest.approx(weights[14:].sum().item())


@pytest.mark.parametrize("over_dims", ["sum", "mean"])
@pytest.mark.parametrize("over_views", ["sum", "mean", "scale_mean"])
def test_multi_scale_loss_against_loops(over_dims, over_views):
    image, views = vectors(3, 7), vectors(3, 14, 7, seed=1)
    expected = 0.0
    for i in range(3):
        for n, first in ((1, 0), (2, 1), (3, 5)):
            for view in range(first, first + n * n):
                share = {"sum": 1, "mean": 1 / 14, "scale_mean": 1 / (3 * n * n)}[over_views]
                expected += share * distance(image[i], views[i, view], over_dims) / 3
    found = multi_scale_loss(image, views, view_weights((1, 2, 3), over_views), over_dims=over_dims)
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("over_dims", ["sum", "mean"])
@pytest.mark.parametrize("over_segments", ["sum", "mean"])
def test_match_loss_against_loops(over_dims, over_segments):
    segments, tiles = vectors(3, 4, 6), vectors(3, 9, 6, seed=1)
    expected, places = 0.0, []
    for i in range(3):
        for g in range(4):
            costs = [distance(segments[i, g], tile, over_dims) for tile in tiles[i]]
            places.append(costs.index(min(costs)))
            expected += min(costs) / 3 / (4 if over_segments == "mean" else 1)
    found, nearest = match_loss(segments, tiles, over_dims=over_dims, over_segments=over_segments)
    assert found.item() == pytest.approx(expected, rel=1e-5)
    assert nearest.flatten().tolist() == places


def test_match_loss_is_zero_when_segments_copy_tiles():
    tiles = vectors(2, 29, 16)
    order = torch.tensor([3, 17, 5, 28, 0, 9, 11, 2])
    loss, nearest = match_loss(tiles[:, order], tiles, over_dims="sum", over_segments="sum")
    assert loss.item() == 0 and (nearest == order).all()
    assert distinct_tiles(nearest, 29).item() == 8


def test_gradients_reach_segments_through_their_nearest_tile_only():
    segments, tiles = vectors(2, 4, 6).requires_grad_(), vectors(2, 9, 6, seed=1).requires_grad_()
    loss, nearest = match_loss(segments, tiles, over_dims="sum", over_segments="sum")
    loss.backward()
    assert tiles.grad is None
    for i in range(2):
        for g in range(4):
            towards = (segments[i, g] - tiles[i, nearest[i, g]]).sign() / 2
            torch.testing.assert_close(segments.grad[i, g], towards.detach())


def test_views_get_no_gradient_and_the_image_gets_the_median_one():
    image, views = vectors(1, 6).requires_grad_(), vectors(1, 5, 6, seed=1).requires_grad_()
    multi_scale_loss(image, views, view_weights((1, 2), "sum"), over_dims="sum").backward()
    assert views.grad is None
    torch.testing.assert_close(image.grad[0], (image[0] - views[0]).sign().sum(dim=0).detach())


def test_views_of_lower_weight_lose_the_vote():
    """The minimiser is a weighted median: four equal tiles win with `mean`, the whole square ties with `scale_mean`."""
    views = torch.tensor([[[1.0], [0.0], [0.0], [0.0], [0.0]]])
    for reduction, expected in (("mean", 0.2), ("scale_mean", 0.5)):
        weights = view_weights((1, 2), reduction)
        assert multi_scale_loss(torch.zeros(1, 1), views, weights, over_dims="sum").item() == pytest.approx(expected)


def test_reconstruction_counts_hidden_patches_only():
    predicted, target = torch.randn(2, 5, 12), torch.randn(2, 5, 12)
    hidden = torch.tensor([[True, False, False, True, False], [False, False, True, False, False]])
    total, count = 0.0, 0
    for i in range(2):
        for n in range(5):
            if hidden[i, n]:
                total += (
                    sum((float(a) - float(b)) ** 2 for a, b in zip(predicted[i, n], target[i, n], strict=True)) / 12
                )
                count += 1
    found = reconstruction_loss(predicted, target, hidden)
    assert count == 3 and found.item() == pytest.approx(total / 3, rel=1e-5)
    changed = torch.where(hidden[:, :, None], predicted, predicted + 100)
    assert reconstruction_loss(changed, target, hidden).item() == found.item()
    assert reconstruction_loss(predicted, target, torch.zeros_like(hidden)).item() == 0


def test_distinct_tiles_by_hand():
    assert distinct_tiles(torch.tensor([[0, 0, 0], [1, 2, 0]]), 4).item() == 2
