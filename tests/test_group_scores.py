"""Scores of groups: confidences by hand and against a plain version, and maps before the largest is taken."""

import math

import pytest
import torch
import torch.nn.functional as F
from group_cases import plain_confidence

from pipeline.nn.group_scores import GroupScores, group_confidence, hard_groups, paint


def units(rows, dim, seed):
    return F.normalize(torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("num_classes", [1, 3, 5, 6, 11])
def test_confidence_is_a_product_of_two_softmaxes(num_classes):
    segments, image, classes = units(4, 8, 0), units(1, 8, 1)[0], units(num_classes, 8, 2)
    found = group_confidence(segments, image, classes, 7.0)
    expected = torch.tensor(plain_confidence(segments, image, classes, 7.0, 5))
    torch.testing.assert_close(found, expected)
    assert ((found > 0).sum(1) == min(5, num_classes)).all()
    if num_classes <= 5:
        torch.testing.assert_close(found, (7.0 * segments @ classes.T).softmax(1).square())


def test_confidence_by_hand():
    # Cosines 1, 0 for the first group; the image's best two of three classes are 0 and 2.
    third = math.log(3)
    segments, image = torch.tensor([[1.0, 0.0]]), torch.tensor([0.6, 0.8])
    classes = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.0, 1.0]])
    found = group_confidence(segments, image, classes, third, top=2)
    torch.testing.assert_close(found, torch.tensor([[3 / 5 * 3 / 4, 0.0, 1 / 5 * 1 / 4]]))


def test_equal_classes_do_not_widen_the_gate():
    same = units(1, 4, 0).expand(7, -1)
    assert ((group_confidence(units(2, 4, 1), same[0], same, 3.0) > 0).sum(1) == 5).all()


def test_class_order_does_not_matter():
    segments, image, classes = units(4, 8, 0), units(1, 8, 1)[0], units(9, 8, 2)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        group_confidence(segments, image, classes[order], 7.0),
        group_confidence(segments, image, classes, 7.0)[:, order],
    )


def test_maps_are_upsampled_before_the_largest_is_taken():
    # Shares 0.9 -> 0.2 of the first group along four columns: the crossing lies within the second half, not at a patch.
    first = torch.tensor([[0.9, 0.2]])
    owner = hard_groups(torch.stack([first, 1 - first]), (1, 16))
    # Between the centres at 3.5 and 11.5 px the share falls by 0.7 / 8 a pixel: 0.5 at 3.5 + 8 * 4 / 7 = 8.07.
    assert owner[0].tolist() == [0] * 9 + [1] * 7
    coarse = torch.stack([first, 1 - first]).argmax(0).repeat_interleave(8, dim=1)
    assert not torch.equal(owner, coarse)
    scores = GroupScores(torch.tensor([[0.3, 0.1], [0.2, 0.7]]), torch.stack([first, 1 - first]))
    painted = paint(scores, (1, 16))
    assert torch.equal(painted[:, 0, 0], scores.confidence[0]) and torch.equal(painted[:, 0, 15], scores.confidence[1])
