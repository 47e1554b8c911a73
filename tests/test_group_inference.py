"""Segmentation by groups: the background rule by hand and against a plain loop over its thresholds."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from group_cases import ToyGroups, picture, plain_confidence

from pipeline.evaluation.scoring import group_grid
from pipeline.inference import (
    BACKGROUNDS,
    Geometry,
    GroupModel,
    ScoreModel,
    Segmenter,
    normalise,
    resize_image,
    threshold_labels,
)
from pipeline.nn import windows
from pipeline.nn.group_scores import GroupScores, paint
from pipeline.nn.windows import background_table
from pipeline.params import ParamsError

GRID = group_grid(0.5)
NATIVE = Geometry(short_side=None, long_side=2048, window=None, stride=1, multiple=1, antialias=False)
SLIDING = Geometry(short_side=20, long_side=100, window=16, stride=8, multiple=4, antialias=False)


class FixedGroups:
    """The same answer for every window, whatever its size."""

    def __init__(self, confidence, maps):
        self.answer = GroupScores(torch.tensor(confidence), torch.tensor(maps))

    def encode_text(self, texts):
        return torch.eye(len(texts))

    def groups(self, pixels, class_embeddings):
        return self.answer

    def segment(self, pixels, class_embeddings):
        return paint(self.answer, tuple(pixels.shape[-2:]))


def segmenter(model, num_classes=3, geometry=NATIVE, background="group_threshold", thresholds=GRID, **changes):
    embeddings = model.encode_text([f"class {index}" for index in range(num_classes)])
    settings = {"num_foreground": num_classes, "has_background": True, "device": "cpu", **changes}
    rule = BACKGROUNDS[background]
    return Segmenter(model, embeddings, geometry=geometry, background=rule, thresholds=thresholds, **settings)


def test_the_cap_keeps_the_best_group():
    confidence = torch.tensor([[0.30, 0.10], [0.20, 0.25], [0.05, 0.01]])
    table = background_table(confidence, torch.tensor([0.0, 0.05, 0.2, 0.26, 0.3, 0.95]))
    assert table.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 1], [0, 1, 1], [0, 1, 1]]


def test_a_group_without_pixels_caps_too():
    # The third group owns nothing; without it the cap would be 0.25 and the second group would stay.
    confidence = [[0.20, 0.10], [0.20, 0.25], [0.60, 0.10]]
    maps = [[[0.5, 0.4]], [[0.4, 0.5]], [[0.1, 0.1]]]
    image = np.zeros((4, 8, 3), np.uint8)
    best, labels = segmenter(FixedGroups(confidence, maps), num_classes=2)(image)
    assert threshold_labels(best, labels, 0.95).eq(0).all()
    assert threshold_labels(best, labels, 0.2).tolist() == [[1] * 4 + [2] * 4] * 4
    seen, labels = segmenter(FixedGroups(confidence[:2], maps[:2]), num_classes=2)(image)
    assert threshold_labels(seen, labels, 0.95).tolist() == [[0] * 4 + [2] * 4] * 4


class TwoWindows(FixedGroups):
    """Two windows in turn, all pixels of either group 0, whose scores of class 0 are given; group 1 owns nothing."""

    def __init__(self, left, right):
        self.left, self.right, self.calls = left, right, 0

    def groups(self, pixels, class_embeddings):
        self.calls += 1
        own, other = (self.left, self.right)[(self.calls - 1) % 2]
        return GroupScores(torch.tensor([[own, 0.0], [other, 0.0]]), torch.tensor([[[0.9]], [[0.1]]]))


def test_foreground_scores_stay_in_place_under_background():
    """Where a window that calls a pixel background overlaps one that does not, the class scores of both decide."""
    geometry, image = dataclasses.replace(NATIVE, window=4, stride=2), np.zeros((4, 6, 3), np.uint8)
    best, labels = segmenter(TwoWindows((0.55, 0.9), (0.8, 0.0)), num_classes=2, geometry=geometry)(image)
    # In the overlap the class has (0.55 + 0.8) / 2, background (1 + 0) / 2.
    assert threshold_labels(best, labels, 0.6).tolist() == [[0, 0, 1, 1, 1, 1]] * 4
    assert threshold_labels(best, labels, 0.55).tolist() == [[1] * 6] * 4
    # The right window's group is its best: no threshold makes it background.
    assert threshold_labels(best, labels, 1.0).tolist() == [[0, 0, 1, 1, 1, 1]] * 4
    best, labels = segmenter(TwoWindows((0.15, 0.9), (0.8, 0.0)), num_classes=2, geometry=geometry)(image)
    assert threshold_labels(best, labels, 0.6).tolist() == [[0, 0, 0, 0, 1, 1]] * 4  # 0.475 against 0.5


def test_of_equal_scores_background_wins():
    geometry, image = dataclasses.replace(NATIVE, window=4, stride=2), np.zeros((4, 6, 3), np.uint8)
    best, labels = segmenter(TwoWindows((0.25, 0.9), (0.75, 0.0)), num_classes=2, geometry=geometry)(image)
    assert threshold_labels(best, labels, 0.6).tolist() == [[0, 0, 0, 0, 1, 1]] * 4  # 0.5 against 0.5
    best, labels = segmenter(FixedGroups([[0.0, 0.0]], [[[1.0]]]), num_classes=2)(image)
    assert best.eq(windows.NEVER).all() and threshold_labels(best, labels, 0.0).eq(0).all()


def plain_labels(model, image, geometry, embeddings, threshold):
    """Steps 1 to 7 of the card for one threshold, background as channel 0."""
    height, width = image.shape[:2]
    canvas = geometry.canvas(height, width)
    pixels = normalise(resize_image(image, canvas, geometry.antialias), "cpu")
    total, count = torch.zeros(len(embeddings) + 1, *canvas), torch.zeros(canvas)
    for top, left, tall, wide in geometry.windows(*canvas):
        crop = pixels[:, :, top : top + tall, left : left + wide]
        crop = F.pad(crop, (0, -wide % geometry.multiple, 0, -tall % geometry.multiple))
        segments, mean, maps = model.parts(crop)
        rows = plain_confidence(segments, mean, embeddings, model.scale, 5)
        cap = min(threshold, max(max(row) for row in rows))
        up = F.interpolate(maps[None], crop.shape[2:], mode="bilinear", align_corners=False)[0]
        for y in range(tall):
            for x in range(wide):
                row = rows[int(up[:, y, x].argmax())]
                total[:, top + y, left + x] += torch.tensor([float(max(row) < cap), *row])
                count[top + y, left + x] += 1
    averaged = total / count
    if canvas != (height, width):
        averaged = F.interpolate(averaged[None], (height, width), mode="bilinear", align_corners=False)[0]
    return averaged.argmax(0)


@pytest.mark.parametrize(
    ("size", "geometry", "num_classes", "scale"),
    [
        ((12, 16), NATIVE, 3, 1.0),
        ((16, 16), SLIDING, 3, 2.0),
        ((30, 41), SLIDING, 8, 4.0),
        ((13, 37), SLIDING, 6, 3.0),
    ],
)
def test_every_threshold_of_the_grid_is_exact(size, geometry, num_classes, scale):
    model, image = ToyGroups(groups=4, scale=scale, seed=num_classes), picture(*size, seed=size[1])
    geometry = geometry if geometry is SLIDING else dataclasses.replace(geometry, multiple=4)
    harness = segmenter(model, num_classes, geometry)
    best, labels = harness(image)
    assert set(best.unique().tolist()) <= {windows.NEVER, *torch.tensor(GRID).tolist()}
    shares = set()
    for threshold in GRID[:: 3 if size == (30, 41) else 1]:
        expected = plain_labels(model, image, geometry, harness.embeddings, threshold)
        assert torch.equal(threshold_labels(best, labels, threshold), expected), threshold
        shares.add(float((expected == 0).float().mean()))
    assert len(shares) >= 3 and min(shares) == 0 and max(shares) < 1  # the cases differ, and the cap holds


def test_one_threshold_answers_as_the_grid_does():
    model, image = ToyGroups(groups=4, scale=4.0), picture(30, 41)
    best, labels = segmenter(model, 8, SLIDING)(image)
    for threshold in (0.0, 0.35, 0.95):
        single, same = segmenter(model, 8, SLIDING, thresholds=(threshold,))(image)
        assert torch.equal(same, labels)
        assert torch.equal(threshold_labels(single, same, threshold), threshold_labels(best, labels, threshold))


def test_channels_are_chunked_without_a_trace(monkeypatch):
    model, image = ToyGroups(groups=4), picture(30, 41)
    best, labels = segmenter(model, 8, SLIDING)(image)
    monkeypatch.setattr(windows, "SCORES_AT_ONCE", 3 * 30 * 41)
    parts = segmenter(model, 8, SLIDING)(image)
    assert torch.equal(parts[0], best) and torch.equal(parts[1], labels)


def test_painted_scores_serve_the_other_rules():
    model, image = ToyGroups(groups=4), picture(30, 41)
    best, labels = segmenter(model, 8, SLIDING)(image)
    scores, painted = segmenter(model, 8, SLIDING, background="max_probability", thresholds=())(image)
    assert torch.equal(painted, labels) and 0 < scores.min() and scores.max() <= 1
    # Within one window the two rules differ by the cap alone.
    image = picture(16, 16)
    best, labels = segmenter(model, 8, dataclasses.replace(NATIVE, multiple=4))(image)
    scores, painted = segmenter(model, 8, background="max_probability", thresholds=())(image)
    groups = model.groups(normalise(image, "cpu"), model.encode_text([f"class {index}" for index in range(8)]))
    low = min(t for t in GRID if t > float(scores.min()))
    assert low <= float(groups.confidence.max())
    assert torch.equal(threshold_labels(best, labels, low), threshold_labels(scores, painted, low))


def test_a_benchmark_without_background_has_none():
    model = ToyGroups(groups=4)
    _, labels = segmenter(model, 8, SLIDING, background="none", has_background=False, thresholds=())(picture(30, 41))
    _, shifted = segmenter(model, 8, SLIDING)(picture(30, 41))
    assert labels.min() == 0 and torch.equal(labels + 1, shifted)
    with pytest.raises(ValueError, match="use background: none"):
        segmenter(model, 8, has_background=False)


def test_models_without_groups_are_refused():
    class Plain:
        def encode_text(self, texts):
            return torch.eye(len(texts))

        def segment(self, pixels, class_embeddings):
            return torch.zeros(len(class_embeddings), 1, 1)

    assert isinstance(Plain(), ScoreModel) and not isinstance(Plain(), GroupModel)
    assert isinstance(ToyGroups(), GroupModel)
    with pytest.raises(ParamsError, match="group_threshold: Plain has no groups"):
        segmenter(Plain())
    with pytest.raises(ParamsError, match="constant_logit: ToyGroups scores a word by more"):
        segmenter(ToyGroups(), background="constant_logit", thresholds=())
    with pytest.raises(ValueError, match="different ones, ascending"):
        segmenter(ToyGroups(), thresholds=(0.5, 0.2))
    broken = FixedGroups([[math.nan, 0.5]], [[[1.0]]])
    with pytest.raises(ValueError, match="not finite"):
        segmenter(broken, num_classes=2)(picture(4, 4))


def test_the_grid_holds_the_papers_thresholds_and_the_given_one():
    assert len(group_grid(0.5)) == 21 and len(group_grid(0.333)) == 22 and 0.333 in group_grid(0.333)
    assert {0.95, 0.9, 0.5, 0.35, 0.05, 0.0, 1.0} <= set(group_grid(0.5))
    assert list(group_grid(0.333)) == sorted(group_grid(0.333))
