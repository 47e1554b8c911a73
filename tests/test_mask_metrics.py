"""Boundary IoU, mask probing and the bootstrap, against slow plain versions and by hand."""

import cv2
import numpy as np
import pytest
import torch

from pipeline.evaluation import resampling
from pipeline.mask_metrics import BoundaryIoU, best_jaccard, boundary_width, inner_boundary
from pipeline.metrics import ConfusionMatrix, region_counts


def reference_band(mask, distance):
    """As the boundary IoU paper's code has it: a border of zeros, eroded by 3 x 3 that many times, taken away."""
    padded = cv2.copyMakeBorder(mask.astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT, value=0)
    eroded = cv2.erode(padded, np.ones((3, 3), np.uint8), iterations=distance)
    return mask & ~eroded[1:-1, 1:-1].astype(bool)


def blobs(seed, height=60, width=90, classes=4):
    """Label maps with smooth borders."""
    rng = np.random.default_rng(seed)
    fields = [cv2.GaussianBlur(rng.normal(size=(height, width)), (0, 0), 6) for _ in range(classes)]
    return np.argmax(fields, axis=0).astype(np.int64)


@pytest.mark.parametrize("distance", [1, 2, 5])
def test_all_classes_at_once_equal_each_class_alone(distance):
    labels = blobs(0)
    band = inner_boundary(labels, distance)
    for index in range(4):
        assert np.array_equal(band & (labels == index), reference_band(labels == index, distance))


def test_boundary_iou_equals_a_slow_version_over_images():
    metric, hit, union = BoundaryIoU(4), np.zeros(4), np.zeros(4)
    for seed in range(3):
        prediction, truth = blobs(seed), blobs(seed + 10)
        truth[seed : seed + 5, 10:50] = 255
        metric.update(prediction, truth.astype(np.uint8))
        distance = boundary_width(60, 90)
        for index in range(4):
            valid = truth != 255
            ours = reference_band(prediction == index, distance) & valid
            theirs = reference_band(truth == index, distance) & valid
            hit[index] += (ours & theirs).sum()
            union[index] += (ours | theirs).sum()
    np.testing.assert_allclose(metric.iou().numpy(), hit / union, rtol=0, atol=1e-12)
    assert metric.miou() == pytest.approx(np.mean(hit / union), abs=1e-12)


def test_boundaries_by_hand():
    """6 x 8 pixels, band of 1: a 4 x 4 square moved by one column shares its upper and lower row but one pixel each."""
    truth, prediction = np.zeros((6, 8), np.int64), np.zeros((6, 8), np.int64)
    truth[1:5, 1:5], prediction[1:5, 2:6] = 1, 1
    metric = BoundaryIoU(3)
    metric.update(prediction, truth)
    # Rings of 12 that share columns 2 to 4 of rows 1 and 4; elsewhere a ring meets the other's inside.
    assert metric.iou()[1].item() == pytest.approx(6 / 18)
    assert metric.iou()[2].isnan() and metric.miou() == pytest.approx(metric.iou()[:2].mean().item())
    perfect = BoundaryIoU(3)
    perfect.update(truth, truth)
    assert perfect.miou() == 1


def test_the_width_grows_with_the_diagonal():
    assert [boundary_width(3, 4), boundary_width(30, 40), boundary_width(375, 500)] == [1, 1, 12]


def test_an_image_without_valid_pixels_counts_nothing():
    metric = BoundaryIoU(2)
    metric.update(np.zeros((5, 5), np.int64), np.full((5, 5), 255))
    assert np.isnan(metric.miou())


def test_mask_probing_equals_loops():
    truth, regions = blobs(1), blobs(2, classes=7)
    truth[:4] = 255
    valid = truth != 255
    best = []
    for index in (1, 2, 3):
        found = [
            ((regions == r) & (truth == index)).sum() / (((regions == r) & valid) | (truth == index)).sum()
            for r in range(7)
        ]
        best.append(max(found))
    counts = region_counts(torch.tensor(regions), torch.tensor(truth), 4)
    assert best_jaccard(counts, True) == pytest.approx(np.mean(best), abs=1e-12)
    assert best_jaccard(counts, False) != best_jaccard(counts, True)


def test_without_an_object_there_is_nothing_to_probe():
    counts = region_counts(torch.zeros(3, 3, dtype=torch.int64), torch.zeros(3, 3, dtype=torch.int64), 2)
    assert np.isnan(best_jaccard(counts, True)) and best_jaccard(counts, False) == 1


def areas_of(pairs, classes):
    rows = []
    for prediction, truth in pairs:
        single = ConfusionMatrix(classes)
        single.update(prediction, truth)
        rows.append(torch.stack([single.counts.diagonal(), single.counts.sum(0), single.counts.sum(1)]).numpy())
    return np.stack(rows)


def test_draws_equal_a_loop_over_drawn_images():
    """Class 4 never occurs and counts in no draw; class 3 is in one image and drops out of draws without it."""
    pairs = [(blobs(seed, classes=3), blobs(seed + 20, classes=3)) for seed in range(5)]
    pairs.append((blobs(6), blobs(26)))
    areas = areas_of(pairs, 5)
    found = resampling.resampled_miou(areas)
    rng = np.random.default_rng(resampling.SEED)
    times = rng.multinomial(6, np.full(6, 1 / 6), size=resampling._CHUNK)
    for draw, weights in enumerate(times[:20]):
        total = ConfusionMatrix(5)
        for (prediction, truth), often in zip(pairs, weights, strict=True):
            for _ in range(often):
                total.update(prediction, truth)
        assert found[draw] == pytest.approx(total.miou(), abs=1e-12)
    assert len(found) == resampling.DRAWS


def test_draws_of_void_images_alone_are_left_out():
    one = areas_of([(blobs(0), blobs(1))], 4)
    areas = np.concatenate([one, np.zeros_like(one)])
    found = resampling.resampled_miou(areas)
    assert resampling.DRAWS / 2 < len(found) < resampling.DRAWS and np.isfinite(found).all()  # a quarter is void
    assert np.isfinite(resampling.spread(areas)).all()


def test_the_interval_surrounds_the_score_and_narrows_with_images():
    pairs = [(blobs(seed), blobs(seed + 50)) for seed in range(12)]
    few, many = areas_of(pairs, 4), areas_of(pairs * 4, 4)
    (low, high, error), (_, _, smaller) = resampling.spread(few), resampling.spread(many)
    total = few.sum(0)
    assert low < np.mean(total[0] / (total[1] + total[2] - total[0])) < high
    assert smaller == pytest.approx(error / 2, rel=0.15)
    assert resampling.spread(few) == resampling.spread(few)


def test_equal_images_leave_no_doubt():
    areas = np.repeat(areas_of([(blobs(0), blobs(1))], 4), 5, axis=0)
    low, high, error = resampling.spread(areas)
    assert low == pytest.approx(high, abs=1e-12) and error == pytest.approx(0, abs=1e-12)
