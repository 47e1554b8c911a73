"""The harness: geometry by hand, window averaging against a plain loop, background rules, prompts."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from inference_cases import PixelModel

from pipeline import inference
from pipeline.inference import (
    BACKGROUNDS,
    Geometry,
    ScoreModel,
    Segmenter,
    class_embeddings,
    nearest,
    normalise,
    resize_image,
    threshold_labels,
)
from pipeline.nn import windows
from pipeline.params import ParamsError

PAPER = Geometry(short_side=448, long_side=2048, window=448, stride=224, multiple=1, antialias=False)
NATIVE = Geometry(short_side=None, long_side=2048, window=None, stride=1, multiple=1, antialias=False)


def segmenter(model, geometry=NATIVE, background="max_probability", names=("red", "green", "blue"), stuff=(), **kwargs):
    embeddings, _ = class_embeddings(model, [*names, *stuff], ["a photo of {}."], "average_first")
    settings = {"num_foreground": len(names), "has_background": True, "device": "cpu", **kwargs}
    return Segmenter(model, embeddings, geometry=geometry, background=BACKGROUNDS[background], **settings)


def picture(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_windows_leave_no_gaps():
    with pytest.raises(ParamsError, match="stride: 449 leaves gaps between windows of 448"):
        dataclasses.replace(PAPER, stride=449)
    dataclasses.replace(PAPER, stride=448)


def test_canvas_and_windows_of_the_paper():
    assert PAPER.canvas(375, 500) == (448, 597)
    assert [(left, wide) for _, left, _, wide in PAPER.windows(448, 597)] == [(0, 448), (149, 448)]
    assert PAPER.canvas(100, 1000) == (205, 2048)  # the long side binds
    assert list(PAPER.windows(205, 448)) == [(0, 0, 205, 448)]
    assert NATIVE.canvas(33, 47) == (33, 47)
    assert list(NATIVE.windows(33, 47)) == [(0, 0, 33, 47)]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 12, 13, 30])
def test_windows_match_the_released_formula_and_cover_everything(length):
    geometry = dataclasses.replace(PAPER, window=8, stride=4)
    spans = [(left, wide) for _, left, _, wide in geometry.windows(5, length)]
    count = max(length - 8 + 4 - 1, 0) // 4 + 1
    expected = []
    for k in range(count):
        end = min(4 * k + 8, length)
        expected.append((max(end - 8, 0), end - max(end - 8, 0)))
    assert spans == expected
    assert set(range(length)) == {x for left, wide in spans for x in range(left, left + wide)}
    assert spans[-1][0] + spans[-1][1] == length


def test_windows_are_averaged_as_a_plain_loop_does():
    geometry = Geometry(short_side=20, long_side=100, window=12, stride=7, multiple=1, antialias=False)
    model, image = PixelModel(patch=4), picture(30, 41)
    best, labels = segmenter(model, geometry)(image)
    canvas = geometry.canvas(30, 41)
    pixels = normalise(resize_image(image, canvas, False), "cpu")
    embeddings = model.encode_text(["red", "green", "blue"])
    total, count = torch.zeros(3, *canvas), torch.zeros(canvas)
    tops = [0, 7, 8]
    lefts = [0, 7, 14, 15]
    assert canvas == (20, 27)
    for top in tops:
        for left in lefts:
            scores = model.segment(pixels[:, :, top : top + 12, left : left + 12], embeddings)
            up = F.interpolate(scores[None], (12, 12), mode="bilinear", align_corners=False)[0]
            for y in range(12):
                for x in range(12):
                    total[:, top + y, left + x] += up[:, y, x]
                    count[top + y, left + x] += 1
    full = F.interpolate((total / count)[None], (30, 41), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(best, full.max(0).values)
    assert torch.equal(labels, full.argmax(0) + 1)


def test_a_local_model_does_not_notice_windows():
    whole = segmenter(PixelModel())(picture(17, 23))
    slid = segmenter(PixelModel(), dataclasses.replace(NATIVE, window=8, stride=3))(picture(17, 23))
    torch.testing.assert_close(whole[0], slid[0])
    assert torch.equal(whole[1], slid[1])


def test_silent_channels_change_nothing():
    """Scores with zeros, ties and all-zero channels: the winner is that of all channels, the lowest of equal ones."""
    generator = torch.Generator().manual_seed(0)
    for silent in ([], [0, 3], [1, 2, 4], [0, 1, 2, 3, 4]):
        scores = torch.randint(-1, 3, (2, 5, 4, 6), generator=generator).float()
        scores[:, silent] = 0
        told = [
            windows.Window(0, left, 4, 6, (4, 6), windows.GridScores(part))
            for left, part in ((0, scores[0]), (3, scores[1]))
        ]
        best, winner = windows.best_channel(told, (4, 9), (4, 9))
        total = torch.cat(list(windows.image_scores(told, (4, 9), (4, 9))))
        assert torch.equal(best, total.amax(0)) and torch.equal(winner, total.argmax(0))


def test_classes_are_chunked_without_a_trace(monkeypatch):
    names = [f"{i} {color}" for i in range(5) for color in ("red", "green", "blue")]
    image = picture(9, 11)
    best, labels = segmenter(PixelModel(), names=names)(image)
    monkeypatch.setattr(windows, "SCORES_AT_ONCE", 2 * 9 * 11)
    chunked_best, chunked_labels = segmenter(PixelModel(), names=names)(image)
    assert torch.equal(labels, chunked_labels) and torch.equal(best, chunked_best)
    assert labels.max() <= 3  # equal scores: the lowest class


def test_class_order_does_not_matter():
    image = picture(10, 12)
    _, labels = segmenter(PixelModel(), names=("red", "green", "blue"))(image)
    _, moved = segmenter(PixelModel(), names=("blue", "red", "green"))(image)
    assert torch.equal(torch.tensor([0, 3, 1, 2])[moved], labels)


def test_threshold_ends():
    best, labels = segmenter(PixelModel())(picture(10, 12))
    assert torch.equal(threshold_labels(best, labels, 0.0), labels) and (labels > 0).all()
    assert (threshold_labels(best, labels, 1.01) == 0).all()
    assert threshold_labels(best, labels, None) is labels
    middle = threshold_labels(best, labels, float(best.median()))
    assert torch.equal(middle == 0, best < best.median())


def test_stuff_words_become_background():
    image = np.zeros((4, 6, 3), np.uint8)
    image[:, :3, 0] = 255
    image[:, 3:, 1] = 255
    _, labels = segmenter(PixelModel(), background="extra_vocabulary", names=("red", "blue"), stuff=("green",))(image)
    assert labels[:, :3].eq(1).all() and labels[:, 3:].eq(0).all()


def test_a_constant_logit_is_compared_with_each_class_alone():
    """Sigmoids of the shrunk logits, averaged over windows, against a constant: a plain loop, unlike the softmax's."""
    geometry, image = dataclasses.replace(NATIVE, window=6, stride=4), picture(6, 10)
    names = ("red", "green", "blue")
    best, labels = segmenter(PixelModel(), geometry, "constant_logit", names)(image)
    cells, vectors = normalise(image, "cpu")[0].double(), PixelModel().encode_text(list(names)).double()
    vectors = F.normalize(vectors, dim=1)
    for y in range(6):
        for x in range(10):
            scores = [1 / (1 + np.exp(2.5 - 0.1 * float(cells[:, y, x] @ vector))) for vector in vectors]
            assert best[y, x].item() == pytest.approx(max(scores), abs=1e-6)
            assert labels[y, x] == 1 + int(np.argmax(scores))
    # A logit below 0 is background at the bias's sigmoid, whatever else is asked; the softmax has another order.
    dark = threshold_labels(best, labels, 1 / (1 + np.exp(2.5))) == 0
    assert torch.equal(dark, (torch.einsum("dhw,cd->chw", cells, vectors).amax(0) < 0)) and 0 < dark.sum() < 60
    probability, _ = segmenter(PixelModel(), geometry, "max_probability", names)(image)
    assert probability[dark].max() > probability[~dark].min()


def test_more_words_do_not_move_a_constant_logit_but_a_softmax():
    image, few, many = picture(8, 9), ("red", "green"), ("red", "green", *(f"x{i}" for i in range(30)))
    alone = [segmenter(PixelModel(), background="constant_logit", names=names) for names in (few, many)]
    shared = [segmenter(PixelModel(), background="max_probability", names=names) for names in (few, many)]
    (one, first), (other, second) = (found(image) for found in alone)
    same = (first == second) & (first > 0)
    assert same.any() and torch.allclose(one[same], other[same], atol=1e-6)
    (one, _), (other, _) = (found(image) for found in shared)
    assert (one > 2 * other).any()


def test_a_word_without_probability_scores_nothing():
    scores = torch.tensor([0.0, 0.25, 0.5]).view(3, 1, 1)  # the last is the word whose logit is 0
    assert inference.single_scores(scores).flatten().tolist() == pytest.approx([0, 1 / (1 + 2 * np.exp(2.5))])
    assert inference.single_scores(torch.zeros(2, 1, 1)).item() == 0


def test_one_word_alone_is_refused_where_words_are_compared():
    """Its share of the softmax is 1 at every pixel: whatever the threshold, nothing would be background."""
    with pytest.raises(ParamsError, match="one word alone has the probability 1 everywhere.*name another word"):
        segmenter(PixelModel(), names=("red",))
    for background, stuff in (("constant_logit", ()), ("extra_vocabulary_threshold", ("grass",)), ("none", ())):
        segmenter(PixelModel(), background=background, names=("red",), stuff=stuff)


def test_benchmark_without_background():
    _, labels = segmenter(PixelModel(), background="none", has_background=False)(picture(5, 5))
    assert labels.min() == 0 and labels.max() == 2
    with pytest.raises(ValueError, match="use background: none"):
        segmenter(PixelModel(), background="max_probability", has_background=False)


def test_windows_are_padded_to_a_multiple_and_cropped_back():
    model = PixelModel(patch=4)
    best, labels = segmenter(model, dataclasses.replace(NATIVE, multiple=4))(picture(9, 14))
    assert model.seen == [(12, 16)]
    assert labels.shape == (9, 14)
    constant = np.full((9, 14, 3), (255, 0, 0), np.uint8)
    assert segmenter(model, dataclasses.replace(NATIVE, multiple=4))(constant)[1].eq(1).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (37, 3), (64, 64)])
def test_odd_sizes_round_trip(size):
    geometry = Geometry(short_side=16, long_side=64, window=16, stride=8, multiple=4, antialias=True)
    best, labels = segmenter(PixelModel(patch=4), geometry)(picture(*size))
    assert best.shape == labels.shape == size


def test_nan_scores_are_refused():
    model = PixelModel()
    model.segment = lambda pixels, classes: torch.full((3, 2, 2), torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        segmenter(model)(picture(4, 4))


def test_a_fake_is_a_score_model():
    assert isinstance(PixelModel(), ScoreModel)


class TextModel:
    """Un-normalised text vectors of different lengths, so that the two orders differ."""

    vectors = {"a cat": [3.0, 0.0], "cat!": [0.0, 1.0]}

    def encode_text(self, texts):
        return F.normalize(torch.tensor([self.vectors[text] for text in texts]), dim=1)

    def segment(self, pixels, class_embeddings):
        return torch.zeros(len(class_embeddings), 1, 1)


class ProjectingModel(TextModel):
    def project_text(self, texts):
        return torch.tensor([self.vectors[text] for text in texts])


def test_average_first_then_normalise_once():
    templates = ["a {}", "{}!"]
    vectors, order = class_embeddings(ProjectingModel(), ["cat"], templates, "average_first")
    assert order == "average_first"
    torch.testing.assert_close(vectors, F.normalize(torch.tensor([[1.5, 0.5]]), dim=1))
    vectors, order = class_embeddings(ProjectingModel(), ["cat"], templates, "normalise_first")
    torch.testing.assert_close(vectors, F.normalize(torch.tensor([[0.5, 0.5]]), dim=1))
    vectors, order = class_embeddings(TextModel(), ["cat"], templates, "average_first")
    assert order == "normalise_first"  # unit vectors are all this model gives, and that is what is reported
    torch.testing.assert_close(vectors, F.normalize(torch.tensor([[0.5, 0.5]]), dim=1))
    one = [
        class_embeddings(model, ["cat"], ["a {}"], order)[0]
        for model in (TextModel(), ProjectingModel())
        for order in ("average_first", "normalise_first")
    ]
    assert all(torch.equal(vectors, one[0]) for vectors in one)


def test_text_batches_do_not_change_anything(monkeypatch):
    names = ["red", "green", "blue", "pink"]
    whole, _ = class_embeddings(PixelModel(), names, ["x {}", "y {}"], "average_first")
    monkeypatch.setattr(inference, "TEXT_BATCH", 3)
    batched, _ = class_embeddings(PixelModel(), names, ["x {}", "y {}"], "average_first")
    assert torch.equal(whole, batched)


def test_resize_is_opencvs_and_antialias_is_not():
    import cv2

    image = picture(40, 30)
    assert np.array_equal(resize_image(image, (17, 13), False), cv2.resize(image, (13, 17)))
    small = resize_image(image, (4, 3), True)
    assert small.shape == (4, 3, 3)
    blocks = image.reshape(4, 10, 3, 10, 3).mean((1, 3))
    # A triangle filter twice as wide as a block: near the block means, far from OpenCV's two-pixel samples.
    assert abs(small - blocks).mean() < abs(resize_image(image, (4, 3), False) - blocks).mean() / 2
    assert resize_image(image, (40, 30), True) is image


def test_nearest_keeps_labels():
    grid = torch.tensor([[0, 1], [2, 300]])
    assert nearest(grid, (4, 4)).tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 300, 300]] * 2
    assert torch.equal(nearest(grid, (2, 2)), grid)
