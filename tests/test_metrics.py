"""Metrics by hand, against plain loops, and by their properties."""

import math

import numpy as np
import pytest
import torch

from pipeline.metrics import ConfusionMatrix, ThresholdSweep, oracle_classes, oracle_labels, region_counts


def slow_iou(predictions, labels, num_classes, ignore=255):
    """Pixel by pixel, as the definition reads."""
    inter, union = [0] * num_classes, [0] * num_classes
    for prediction, label in zip(predictions, labels, strict=True):
        for p, t in zip(prediction.ravel(), label.ravel(), strict=True):
            if t == ignore:
                continue
            for c in range(num_classes):
                inter[c] += int(p == c and t == c)
                union[c] += int(p == c or t == c)
    return [i / u if u else math.nan for i, u in zip(inter, union, strict=True)]


def random_pair(rng, num_classes, shape=(9, 7)):
    label = rng.integers(0, num_classes, shape).astype(np.uint8)
    label[rng.random(shape) < 0.2] = 255
    return rng.integers(0, num_classes, shape), label


def test_hand_counted():
    matrix = ConfusionMatrix(3)
    matrix.update(torch.tensor([[0, 0], [1, 1]]), torch.tensor([[0, 1], [1, 255]]))
    # class 0: 1 hit of union 2; class 1: 1 hit of union 2 (the ignored pixel's prediction does not count)
    assert matrix.iou()[:2].tolist() == [0.5, 0.5]
    assert math.isnan(matrix.iou()[2])
    assert matrix.miou() == 0.5
    assert matrix.aacc() == pytest.approx(2 / 3)
    assert matrix.macc() == pytest.approx((1 + 0.5) / 2)
    assert matrix.foreground_accuracy() == pytest.approx(0.5)


def test_absent_class_is_skipped_but_a_false_positive_is_zero():
    matrix = ConfusionMatrix(3)
    matrix.update(np.array([0, 0, 2, 0]), np.array([0, 0, 0, 0]))
    assert matrix.iou()[0].item() == 0.75 and math.isnan(matrix.iou()[1]) and matrix.iou()[2].item() == 0
    assert matrix.miou() == pytest.approx(0.375)
    assert matrix.macc() == pytest.approx(0.75)  # class 2 has no true pixel, hence no accuracy


def test_all_ignored_is_nan_not_an_error():
    matrix = ConfusionMatrix(2)
    matrix.update(np.zeros((2, 2), int), np.full((2, 2), 255, np.uint8))
    assert torch.isnan(matrix.iou()).all()
    assert all(math.isnan(v) for v in (matrix.miou(), matrix.aacc(), matrix.macc(), matrix.foreground_accuracy()))
    assert math.isnan(matrix.constant()[1])


@pytest.mark.parametrize("seed", range(3))
def test_parity_with_a_plain_loop(seed):
    rng = np.random.default_rng(seed)
    pairs = [random_pair(rng, 4) for _ in range(3)]
    matrix = ConfusionMatrix(5)  # class 4 is absent
    for prediction, label in pairs:
        matrix.update(prediction, label)
    expected = slow_iou(*zip(*pairs, strict=True), 5)
    np.testing.assert_allclose(matrix.iou().numpy(), expected, rtol=1e-12)


def test_dataset_level_not_a_mean_over_images_and_merge_agrees():
    first, second, both = ConfusionMatrix(2), ConfusionMatrix(2), ConfusionMatrix(2)
    one = (np.array([1, 1, 1, 1]), np.array([1, 1, 1, 1]))
    two = (np.array([1]), np.array([0]))
    first.update(*one)
    second.update(*two)
    both.update(*one)
    both.update(*two)
    first.merge(second)
    assert torch.equal(first.counts, both.counts)
    assert both.iou().tolist() == [0.0, 0.8]
    with pytest.raises(ValueError, match="3 classes into 2"):
        first.merge(ConfusionMatrix(3))


def test_permuting_classes_permutes_iou():
    rng = np.random.default_rng(0)
    prediction, label = random_pair(rng, 4)
    order = np.array([2, 0, 3, 1] + [255] * 252)
    plain, moved = ConfusionMatrix(4), ConfusionMatrix(4)
    plain.update(prediction, label)
    moved.update(order[prediction], order[label])
    torch.testing.assert_close(moved.iou()[order[:4]], plain.iou())


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        ([0, 1], [0, 3], "label holds ids outside 0..2: 3"),
        ([0, 7], [0, 1], "prediction holds ids outside 0..2: 7"),
        ([0, -1], [0, 1], "prediction holds ids outside 0..2: -1"),
        ([0, 1], [0, -1], "label holds ids outside"),
        ([0, 1, 2], [0, 1], "shape"),
    ],
)
def test_wrong_ids_and_shapes_raise(prediction, label, message):
    with pytest.raises(ValueError, match=message):
        ConfusionMatrix(3).update(np.array(prediction), np.array(label))


def test_floats_are_no_labels_and_255_is_a_wrong_id_without_ignore():
    with pytest.raises(TypeError, match="integer"):
        ConfusionMatrix(3).update(np.array([0.5]), np.array([0]))
    with pytest.raises(ValueError, match="255"):
        ConfusionMatrix(3, ignore_index=None).update(np.array([0]), np.array([255]))


def test_uint8_ids_above_127_do_not_wrap():
    matrix = ConfusionMatrix(200)
    matrix.update(np.full(3, 199, np.uint8), np.array([199, 199, 255], np.uint8))
    assert matrix.counts[199, 199] == 2


def test_constant_is_the_best_single_label():
    matrix = ConfusionMatrix(3)
    label = np.array([0, 0, 0, 1, 255])
    matrix.update(np.array([1, 1, 1, 1, 1]), label)
    brute = []
    for c in range(3):
        single = ConfusionMatrix(3)
        single.update(np.full(5, c), label)
        brute.append(single.miou())
    assert matrix.constant() == (0, pytest.approx(max(brute)))


@pytest.mark.parametrize("seed", range(3))
def test_sweep_equals_thresholding_each_image(seed):
    rng = np.random.default_rng(seed)
    thresholds = [0.0, 0.1, 0.25, 0.5, 0.75, 1.01]
    sweep = ThresholdSweep(thresholds, 4)
    matrices = [ConfusionMatrix(4) for _ in thresholds]
    for _ in range(3):
        winner, label = random_pair(rng, 4)
        best = torch.from_numpy(np.round(rng.random(label.shape), 2).astype(np.float32))
        best.view(-1)[:3] = torch.tensor([0.25, 0.5, 0.75])  # ties are kept
        sweep.update(best, winner, label)
        for threshold, matrix in zip(sweep.thresholds, matrices, strict=True):
            matrix.update(np.where(best.numpy() < threshold.item(), 0, winner), label)
    torch.testing.assert_close(sweep.miou(), torch.tensor([m.miou() for m in matrices], dtype=torch.float64))
    best_threshold, best_miou = sweep.best()
    assert best_miou == pytest.approx(max(m.miou() for m in matrices))
    assert best_threshold in thresholds


def test_sweep_ends_are_no_background_and_only_background():
    sweep = ThresholdSweep([0.0, 2.0], 3)
    winner, label = np.array([[1, 2]]), np.array([[1, 0]])
    sweep.update(torch.tensor([[0.3, 0.9]]), winner, label)
    none, everything = ConfusionMatrix(3), ConfusionMatrix(3)
    none.update(winner, label)
    everything.update(np.zeros_like(winner), label)
    assert sweep.miou().tolist() == [none.miou(), everything.miou()]
    with pytest.raises(ValueError, match="at least one"):
        ThresholdSweep([], 3)


def test_oracle_hand_counted_where_the_rules_differ():
    # Region 5: three background pixels and the only two of class 1. Region 9: background only.
    regions = torch.tensor([[5, 5, 5, 5, 5], [9, 9, 9, 9, 9]])
    label = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 255]])
    assert oracle_labels(regions, label, 2, "majority").tolist() == [[0] * 5, [0] * 5]
    # IoU(region 5, class 0) = 3 / 9, IoU(region 5, class 1) = 2 / 5
    assert oracle_labels(regions, label, 2, "best_iou").tolist() == [[1] * 5, [0] * 5]


@pytest.mark.parametrize("rule", ["majority", "best_iou"])
def test_oracle_properties(rule):
    rng = np.random.default_rng(1)
    label = torch.from_numpy(random_pair(rng, 4, (12, 10))[1])
    regions = torch.from_numpy(rng.integers(0, 5, (12, 10)))

    def score(masks):
        matrix = ConfusionMatrix(4)
        matrix.update(oracle_labels(masks, label, 4, rule), label)
        return matrix

    perfect = torch.where(label == 255, 0, label.long())
    assert score(perfect).miou() == 1.0
    permuted = torch.tensor([3, 4, 0, 200, 1])[regions]
    assert torch.equal(score(permuted).counts, score(regions).counts)
    split = regions * 2 + torch.from_numpy(rng.integers(0, 2, (12, 10)))
    if rule == "majority":  # more regions can only raise the number of right pixels
        assert score(split).aacc() >= score(regions).aacc()


def test_oracle_without_valid_pixels_and_bad_input():
    regions = torch.zeros(2, 2, dtype=torch.int64)
    ignored = torch.full((2, 2), 255, dtype=torch.uint8)
    assert oracle_labels(regions, ignored, 3, "majority").tolist() == [[0, 0], [0, 0]]
    assert oracle_labels(regions, ignored, 3, "best_iou").tolist() == [[0, 0], [0, 0]]
    with pytest.raises(ValueError, match="label holds ids"):
        oracle_labels(regions, torch.full((2, 2), 9), 3, "majority")
    with pytest.raises(ValueError, match="regions hold the id -1"):
        oracle_labels(regions - 1, regions, 3, "majority")


@pytest.mark.parametrize("rule", ["majority", "best_iou"])
def test_counting_regions_equals_counting_pixels(rule):
    rng = np.random.default_rng(2)
    label = torch.from_numpy(random_pair(rng, 4, (12, 10))[1])
    regions = torch.from_numpy(rng.choice([0, 3, 7], (12, 10)))
    pixels, fast = ConfusionMatrix(4), ConfusionMatrix(4)
    pixels.update(oracle_labels(regions, label, 4, rule), label)
    counts = region_counts(regions, label, 4)
    assert counts.shape == (8, 4) and counts.sum() == (label != 255).sum()
    fast.add_regions(counts, oracle_classes(counts, rule))
    assert torch.equal(pixels.counts, fast.counts)
