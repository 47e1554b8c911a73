"""PAMR against a loop over pixels, and where it stands in the harness."""

import numpy as np
import pytest
import torch
from voc_root import ColorModel

from pipeline.inference import BACKGROUNDS, Geometry, Segmenter
from pipeline.nn import pamr
from pipeline.params import ParamsError

DIRECTIONS = [(r, c) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)]


def plain(picture, scores, steps):
    """Pixel by pixel in float64; places beyond the border are the border's."""
    height, width = picture.shape[1:]

    def near(x, row, column):
        places = [(row + d * r, column + d * c) for d in pamr.DISTANCES for r, c in DIRECTIONS]
        return np.stack([x[:, np.clip(r, 0, height - 1), np.clip(c, 0, width - 1)] for r, c in places])

    weights = np.zeros((height, width, len(DIRECTIONS) * len(pamr.DISTANCES)))
    for row in range(height):
        for column in range(width):
            others, own = near(picture, row, column), picture[:, row, column]
            around = np.concatenate([others, np.repeat(own[None], len(pamr.DISTANCES), 0)])
            far = (np.abs(others - own) / (0.1 * around.std(0, ddof=1) + 1e-8)).mean(1)
            alike = np.exp(-(far - far.min()))
            weights[row, column] = alike / alike.sum()
    for _ in range(steps):
        moved = [[weights[r, c] @ near(scores, r, c) for c in range(width)] for r in range(height)]
        scores = np.array(moved).transpose(2, 0, 1)
    return scores


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    return rng.normal(size=(3, 7, 9)), rng.random((4, 7, 9))


def test_equals_a_loop_over_pixels(case):
    picture, scores = case
    found = pamr.refine(torch.tensor(picture)[None].float(), torch.tensor(scores).float())
    np.testing.assert_allclose(found.numpy(), plain(picture, scores, pamr.STEPS), atol=2e-5)


def test_a_channel_at_a_time_is_the_same(case, monkeypatch):
    picture, scores = torch.tensor(case[0])[None].float(), torch.tensor(case[1]).float()
    whole = pamr.refine(picture, scores)
    monkeypatch.setattr(pamr, "CHANNELS_AT_ONCE", 1)
    torch.testing.assert_close(pamr.refine(picture, scores), whole)


def test_scores_stay_within_their_range_and_a_plain_picture_only_blurs(case):
    scores = torch.tensor(case[1]).float()
    found = pamr.refine(torch.zeros(1, 3, 14, 18), scores)
    assert scores.min() <= found.min() and found.max() <= scores.max() and found.var() < scores.var()
    flat = torch.full((2, 7, 9), 0.3)
    torch.testing.assert_close(pamr.refine(torch.tensor(case[0])[None].float(), flat), flat)


def test_scores_snap_to_the_edge_of_the_picture():
    """A step of the scores two columns beside the step of the colours moves to it."""
    picture, scores = torch.zeros(1, 3, 24, 32), torch.zeros(1, 24, 32)
    picture[..., 16:], scores[..., 18:] = 3.0, 1.0
    found = pamr.refine(picture, scores)[0]
    assert (found[:, 16:18] > 0.5).all() and (found[:, :16] < 0.1).all()


def segmenter(rule, **settings):
    geometry = Geometry(short_side=32, long_side=64, window=32, stride=16, multiple=1, antialias=True)
    model = ColorModel()
    words = model.encode_text(["red", "green"])
    return Segmenter(
        model, words, num_foreground=2, has_background=True, geometry=geometry, background=BACKGROUNDS[rule],
        device="cpu", **settings,
    )  # fmt: skip


def test_each_window_is_refined_before_windows_are_averaged(monkeypatch):
    seen = []
    monkeypatch.setattr("pipeline.inference.refine", lambda crop, scores: seen.append(crop.shape[2:]) or 0 * scores)
    image = np.random.default_rng(0).integers(0, 255, (32, 48, 3)).astype(np.uint8)
    best, _ = segmenter("max_probability", pamr=True)(image)
    assert seen == [(32, 32), (32, 32)] and (best == 0).all()
    assert (segmenter("max_probability")(image)[0] > 0).any() and len(seen) == 2


def test_groups_have_no_map_to_refine():
    class Grouped(ColorModel):
        def groups(self, pixels, class_embeddings):
            raise AssertionError

    geometry = Geometry(short_side=32, long_side=64, window=None, stride=16, multiple=1, antialias=True)
    model = Grouped()
    with pytest.raises(ParamsError, match="pamr"):
        Segmenter(
            model, model.encode_text(["red"]), num_foreground=1, has_background=True, geometry=geometry,
            background=BACKGROUNDS["group_threshold"], device="cpu", thresholds=(0.5,), pamr=True,
        )  # fmt: skip
