"""The pseudo-mask ViT's pooling by segments, against loops and by hand."""

from dataclasses import replace

import pytest
import torch
from pseudo_mask_vit_cases import batch, model, pooled_by_loops

from pipeline.interfaces import OUTSIDE
from pipeline.methods import pseudo_mask_vit as pmv


@pytest.mark.parametrize("grid", [(4, 4), (2, 4), (1, 1)])
def test_pooling_against_loops(grid):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, *grid, 5, generator=generator)
    regions = torch.randint(0, 4, (3, 4, 4), generator=generator).byte()
    regions[1, :2] = OUTSIDE
    regions[2] = 3
    found, present = pmv.pool_segments(tokens.flatten(1, 2), grid, regions, 6)
    expected, there = pooled_by_loops(tokens, regions, 6)
    torch.testing.assert_close(found, expected)
    assert torch.equal(present, there) and present[2].tolist() == [False] * 3 + [True] + [False] * 2
    image = pmv.pool_image(found, present)
    for i in range(3):
        torch.testing.assert_close(image[i], torch.stack([expected[i, k] for k in range(6) if there[i, k]]).mean(dim=0))


def test_tokens_finer_than_the_masks():
    """Each token takes the label of the cell that it lies in."""
    tokens = torch.randn(1, 16, 3, generator=torch.Generator().manual_seed(0))
    regions = torch.tensor([[[0, 1], [2, 1]]], dtype=torch.uint8)
    found, _ = pmv.pool_segments(tokens, (4, 4), regions, 3)
    expected, _ = pooled_by_loops(tokens.view(1, 4, 4, 3), regions.repeat_interleave(2, 1).repeat_interleave(2, 2), 3)
    torch.testing.assert_close(found, expected)


def test_a_picture_without_any_segment_is_zero():
    regions = torch.full((1, 4, 4), OUTSIDE, dtype=torch.uint8)
    found, present = pmv.pool_segments(torch.randn(1, 16, 3), (4, 4), regions, 2)
    assert not present.any() and not found.any() and not pmv.pool_image(found, present).any()
    data = replace(batch(2), regions=torch.stack([regions[0], torch.zeros(4, 4, dtype=torch.uint8)]))
    terms = model().loss(data)
    assert terms["total"].isfinite() and terms["segments"] == 0.5


def test_one_segment_is_the_mean_over_all_tokens():
    tower, data = model().eval(), batch(3)
    segments, present = tower._segments(data.pixels, torch.zeros_like(data.regions), 1)
    expected = tower.projection(tower.tower(data.pixels)).mean(dim=1)
    torch.testing.assert_close(pmv.pool_image(segments, present), expected)


def test_segments_count_alike_whatever_their_size():
    """The image's vector is no mean over tokens: a segment of one cell weighs as much as the rest."""
    tokens = torch.tensor([[[0.0], [0.0], [0.0], [8.0]]])
    regions = torch.tensor([[[0, 0], [0, 1]]], dtype=torch.uint8)
    assert pmv.pool_image(*pmv.pool_segments(tokens, (2, 2), regions, 2)).item() == 4.0


def test_projecting_before_pooling_is_the_same():
    tower, data = model().eval(), batch(3)
    data.regions[0, 6:] = 2
    segments, present = tower._segments(data.pixels, data.regions, 3)
    projected = tower.projection(tower.tower(data.pixels))
    before, _ = pmv.pool_segments(projected, (4, 4), data.regions, 3)
    torch.testing.assert_close(segments, before)
    torch.testing.assert_close(pmv.pool_image(segments, present), pmv.pool_image(before, present))
