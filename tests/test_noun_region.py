"""SCG's loss by hand, against loops, and what must not count."""

import math

import pytest
import torch
import torch.nn.functional as F

from pipeline.losses import noun_region as nr


def example():
    """Three captions with 2, 0 and 3 nouns; four pictures of five regions, some absent."""
    generator = torch.Generator().manual_seed(0)
    nouns = F.normalize(torch.randn(5, 6, generator=generator), dim=-1)
    regions = F.normalize(torch.randn(4, 5, 6, generator=generator), dim=-1)
    present = torch.rand(4, 5, generator=generator) > 0.4
    present[:, 0] = True
    return nouns, torch.tensor([0, 0, 2, 2, 2]), regions, present


def test_noun_to_region_against_loops():
    nouns, owner, regions, present = example()
    found = nr.noun_to_region(nouns, owner, regions, present, 3)
    for caption in range(3):
        for picture in range(4):
            best = []
            for noun in range(5):
                allowed = [r for r in range(5) if present[picture, r]]
                cosines = [float(nouns[noun] @ regions[picture, r]) for r in allowed]
                if owner[noun] == caption:
                    best.append(max(cosines))
                assert found.best[noun, picture] == allowed[max(range(len(allowed)), key=cosines.__getitem__)]
            expected = sum(best) / len(best) if best else 0.0
            assert found.scores[caption, picture] == pytest.approx(expected, abs=1e-6)


def test_region_to_noun_against_loops():
    nouns, owner, regions, present = example()
    found = nr.region_to_noun(nouns, owner, regions, present, 3)
    for caption in range(3):
        mine = [noun for noun in range(5) if owner[noun] == caption]
        for picture in range(4):
            best = [
                max(float(nouns[n] @ regions[picture, r]) for n in mine)
                for r in range(5)
                if present[picture, r] and mine
            ]
            assert found[caption, picture] == pytest.approx(sum(best) / len(best) if best else 0.0, abs=1e-6)


def test_absent_regions_count_for_nothing():
    nouns, owner, regions, present = example()
    changed = torch.where(present[:, :, None], regions, torch.randn_like(regions))
    for function in (
        lambda r: nr.noun_to_region(nouns, owner, r, present, 3).scores,
        lambda r: nr.region_to_noun(nouns, owner, r, present, 3),
    ):
        torch.testing.assert_close(function(changed), function(regions))


def test_contrast_by_hand():
    scores, scale = torch.tensor([[0.9, 0.1], [0.4, 0.2]]), torch.tensor(2.0)
    e = [[math.exp(2 * value) for value in row] for row in scores.tolist()]
    rows = [e[i][i] / (e[i][0] + e[i][1]) for i in range(2)]
    columns = [e[i][i] / (e[0][i] + e[1][i]) for i in range(2)]
    log = -sum(math.log(value) for value in rows + columns) / 2
    assert nr.contrast(scores, scale, "log").item() == pytest.approx(log, rel=1e-5)
    assert nr.contrast(scores, scale, "printed").item() == pytest.approx(-sum(rows + columns) / 2, rel=1e-5)


def test_a_batch_of_one_is_0_and_minus_2():
    one = torch.tensor([[0.3]])
    assert nr.contrast(one, torch.tensor(10.0), "log").item() == 0
    assert nr.contrast(one, torch.tensor(10.0), "printed").item() == -2


def test_printed_form_is_bounded_and_has_no_gradient_where_it_is_surely_wrong():
    scores = torch.tensor([[-1.0, 1.0], [1.0, -1.0]], requires_grad=True)
    value = nr.contrast(scores, torch.tensor(50.0), "printed")
    value.backward()
    assert -2 <= value.item() <= 0 and scores.grad.abs().max() < 1e-6
    other = scores.detach().requires_grad_()
    nr.contrast(other, torch.tensor(50.0), "log").backward()
    assert other.grad.abs().max() > 1


def test_gradient_goes_through_the_best_region_only():
    nouns, owner, regions, present = example()
    regions.requires_grad_()
    found = nr.noun_to_region(nouns[:1], owner[:1], regions, present, 1)
    found.scores.sum().backward()
    touched = regions.grad.abs().sum(-1) > 0
    assert touched.sum(1).tolist() == [1] * 4 and touched.gather(1, found.best.T).all()
