"""Segmentation by groups: confidences by hand, the background rule against a plain loop over its thresholds."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_evaluate import block
from voc_root import write_root

from pipeline import methods, params
from pipeline.artifacts.weights import save_model
from pipeline.cli import main as tessera
from pipeline.evaluation import Config, candidates
from pipeline.evaluation.config import BenchmarkConfig
from pipeline.evaluation.pairs import evaluate, open_pair
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
from pipeline.machine import Machine
from pipeline.nn import windows
from pipeline.nn.group_scores import GroupScores, group_confidence, hard_groups, paint
from pipeline.nn.windows import background_table
from pipeline.params import ParamsError
from pipeline.project import Project

GRID = group_grid(0.5)
NATIVE = Geometry(short_side=None, long_side=2048, window=None, stride=1, multiple=1, antialias=False)
SLIDING = Geometry(short_side=20, long_side=100, window=16, stride=8, multiple=4, antialias=False)


class ToyGroups(torch.nn.Module):
    """Random groups: a patch belongs to the group whose random direction is nearest to its colours."""

    def __init__(self, groups=3, dim=6, patch=4, scale=4.0, seed=0, sharpness=3.0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.directions = torch.nn.Parameter(torch.randn(groups, 3 * patch * patch, generator=generator))
        self.project = torch.nn.Parameter(torch.randn(dim, 3 * patch * patch, generator=generator))
        self.patch, self.scale, self.sharpness = patch, scale, sharpness
        self.requires_grad_(False)

    def encode_text(self, texts):
        width = len(self.project)
        rows = [torch.randn(width, generator=torch.Generator().manual_seed(sum(map(ord, text)))) for text in texts]
        return F.normalize(torch.stack(rows), dim=1)

    def parts(self, pixels):
        patches = F.unfold(pixels, self.patch, stride=self.patch)[0]
        size = pixels.shape[2] // self.patch, pixels.shape[3] // self.patch
        shares = (self.sharpness * self.directions @ patches / patches.shape[0] ** 0.5).softmax(0)
        average = (shares / shares.sum(1, keepdim=True)) @ patches.T
        segments = F.normalize(average @ self.project.T, dim=1)
        image = F.normalize((average @ self.project.T).mean(0), dim=0)
        return segments, image, shares.unflatten(1, size)

    def groups(self, pixels, class_embeddings):
        segments, image, maps = self.parts(pixels)
        return GroupScores(group_confidence(segments, image, class_embeddings, self.scale), maps)

    def segment(self, pixels, class_embeddings):
        return paint(self.groups(pixels, class_embeddings), tuple(pixels.shape[-2:]))

    def regions(self, pixels):
        return hard_groups(self.parts(pixels)[2], tuple(pixels.shape[-2:]))


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


def picture(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 6 + 1, width // 6 + 1, 3), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(6, 0).repeat(6, 1)[:height, :width])


def softmax(values):
    powers = [math.exp(value) for value in values]
    return [power / sum(powers) for power in powers]


def plain_confidence(segments, image, classes, scale, top):
    """Step 5 of the card, a number at a time."""
    similar = [float(image.double() @ vector.double()) for vector in classes]
    kept = sorted(range(len(classes)), key=lambda index: -similar[index])[:top]
    rows = []
    for segment in segments:
        logits = [scale * float(segment.double() @ vector.double()) for vector in classes]
        gated = [logit if index in kept else -math.inf for index, logit in enumerate(logits)]
        rows.append([a * b for a, b in zip(softmax(logits), softmax(gated), strict=True)])
    return rows


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


RULES = {
    **block()["native"],
    "backgrounds": {"default": ["max_probability"], "toy": ["group_threshold", "extra_vocabulary"]},
    "thresholds": {"default": 0.5, "toy/scenes": 0.333},
}


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    write_root(tmp_path / "sets", {"train": 4, "val": 4})
    save_model(tmp_path / "models/toy", ToyGroups().state_dict(), {"method": "toy", "config": {}})
    monkeypatch.setattr(methods, "load", lambda folder, encoders: ToyGroups(groups=4))
    monkeypatch.setattr(methods, "load_untrained", lambda folder, encoders: ToyGroups(groups=4, seed=1))
    (tmp_path / "params.yaml").write_text(json.dumps({"evaluate": block(native=RULES)}))
    return tmp_path


def report_of(checkout: Path, spec="toy", threshold=0.333):
    values = block(native={**RULES, "thresholds": {"default": 0.5, "toy/scenes": threshold}})
    project = Project(
        checkout, {"evaluate": values}, Machine(runner="inline", workers=1, device="cpu", threads=1, retries=0)
    )
    config = params.build(Config, values, "evaluate")
    entry = BenchmarkConfig(name="scenes", root="sets", limit=None, tune_limit=None)
    pair = open_pair(spec, entry, project.path("sets"), "native", config, project)
    return evaluate(pair, candidates.load(spec, project, config.geometry), bar=False).report


@pytest.mark.parametrize("spec", ["toy", "untrained:toy"])
def test_a_report_by_groups(checkout, spec):
    report = report_of(checkout, spec)
    assert report["background"] == "group_threshold" and list(report["other_backgrounds"]) == ["extra_vocabulary"]
    assert report["threshold"]["chosen_on"] == "train split, 4 images"
    grid = group_grid(0.333)
    at = dict(zip(report["sweep"]["thresholds"], report["sweep"]["miou"], strict=True))
    assert tuple(at) == grid and at[report["threshold"]["value"]] == report["miou"]
    assert report["sweep"]["best_miou"] >= report["miou"] and 0 <= report["fg_accuracy"] <= 1
    assert report["oracle_majority"] >= report["miou"] and 1 <= report["num_regions"] <= 4
    assert 0 < report["oracle_best_iou"] <= 1


def test_without_a_tune_split_the_papers_threshold_is_exact(checkout):
    (checkout / "sets/VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt").unlink()
    scores = []
    for threshold in (0.123, 0.777):
        report = report_of(checkout, threshold=threshold)
        assert report["threshold"] == {"value": threshold, "chosen_on": "params.yaml"}
        at = dict(zip(report["sweep"]["thresholds"], report["sweep"]["miou"], strict=True))
        assert report["miou"] == at[threshold]
        scores.append(report["miou"])
    assert scores[0] != scores[1]


def test_predict_by_groups(checkout, capsys):
    from PIL import Image

    Image.fromarray(picture(32, 48)).save(checkout / "photo.png")
    base = ["--root", str(checkout), "predict", "--model", "toy", "--labels", "red,blue,green,brown,teal,plum"]
    shares = []
    for extra in ([], ["--threshold", "0"], ["--background", "max_probability"]):
        assert tessera([*base, "--out", str(checkout / "o.png"), *extra, str(checkout / "photo.png")]) == 0
        shares.append(float((np.array(Image.open(checkout / "o_labels.png")) == 0).mean()))
    printed = capsys.readouterr().out
    assert "Background: group_threshold, 0 words, threshold 0.333 (params.yaml)" in printed
    assert "threshold 0 (--threshold)" in printed
    assert shares[1] == 0 and shares[0] < 1
