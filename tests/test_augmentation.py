"""RandAugment and random erasing against timm, operation by operation, and their distribution."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data.auto_augment import LEVEL_TO_ARG, rand_augment_transform

from pipeline.datasets import augmentation
from pipeline.datasets.augmentation import OPERATIONS, draw_erased, rand_augment
from pipeline.datasets.pixels import stack_pixels
from pipeline.text import wheel


def picture(seed: int = 0) -> Image.Image:
    smooth = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(smooth).resize((32, 32), Image.Resampling.BICUBIC)


def test_the_operations_are_those_of_the_policy():
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": augmentation.FILL})
    assert sorted(op.name for op in theirs.ops) == sorted(OPERATIONS) and theirs.num_layers == 2
    one = theirs.ops[0]
    settings = (one.prob, one.magnitude, one.magnitude_std)
    assert settings == (augmentation.CHANCE, augmentation.MAGNITUDE, augmentation.DEVIATION)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("level", [0.0, 3.7, 9.0, 10.0])
def test_an_operations_arguments_are_timms(name, level, monkeypatch):
    for sign, drawn in ((1, 0.0), (-1, 1.0)):  # timm negates where its draw is above 0.5
        monkeypatch.setattr(random, "random", lambda drawn=drawn: drawn)
        theirs = LEVEL_TO_ARG[name](level, {}) if LEVEL_TO_ARG[name] else ()
        if name == "PosterizeIncreasing" and level == 10:
            assert theirs == (0,), "no bit at all: a black picture, which Pillow refuses"
            theirs = (1,)
        assert OPERATIONS[name](level / 10, sign) == pytest.approx(theirs)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_runs_at_full_strength(name):
    class Strongest(np.random.Generator):
        """Its draws are the largest."""

        def integers(self, _high, size):
            return np.full(size, list(OPERATIONS).index(name))

        def random(self):
            return 0.0

        def normal(self, _mean, _deviation):
            return 99.0

    assert rand_augment(picture(), 2, Strongest(np.random.PCG64())).size == (32, 32)


def test_the_same_generator_gives_the_same_view_and_the_input_stays():
    image = picture()
    before = image.copy()
    views = [rand_augment(image, 2, np.random.default_rng(seed)) for seed in (1, 1, 2, 3, 4)]
    assert views[0] == views[1] and image == before
    assert len({view.tobytes() for view in views}) > 2
    assert rand_augment(image, 0, np.random.default_rng(0)).tobytes() == image.tobytes()


def test_half_of_the_operations_run(monkeypatch):
    ran, theirs = [], wheel.module("timm", "data/auto_augment").NAME_TO_OP
    for name in OPERATIONS:
        monkeypatch.setitem(theirs, name, lambda image, *_, name=name, **__: ran.append(name) or image)
    rng, image = np.random.default_rng(0), picture()
    for _ in range(1500):
        rand_augment(image, 2, rng)
    assert 1500 * 0.94 < len(ran) < 1500 * 1.06
    counts = [ran.count(name) for name in OPERATIONS]
    assert min(counts) > 70 and max(counts) < 135, "100 of each are expected"


def test_a_batch_is_erased_after_it_is_normalised():
    box = augmentation.Erased(2, 3, np.full((4, 5, 3), 7.0, np.float32))
    views = [np.asarray(picture(seed)) for seed in (0, 1)]
    pixels, plain = stack_pixels(views, [None, box]).to("cpu"), stack_pixels(views).to("cpu")
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[2:6, 3:8] = True
    assert torch.equal(pixels[0], plain[0]) and (pixels[1, :, inside] == 7).all()
    assert torch.equal(pixels[1, :, ~inside], plain[1, :, ~inside])


def test_erasing_has_its_chance_and_its_share():
    rng = np.random.default_rng(0)
    found = [draw_erased(40, 0.25, rng) for _ in range(2000)]
    boxes = [box for box in found if box is not None]
    assert 0.22 < len(boxes) / 2000 < 0.28
    shares = [box.values.shape[0] * box.values.shape[1] / 1600 for box in boxes]
    assert 0.015 < min(shares) and max(shares) < 0.36 and 0.14 < np.mean(shares) < 0.20
    assert all(box.top + box.values.shape[0] <= 40 and box.left + box.values.shape[1] <= 40 for box in boxes)
    noise = np.concatenate([box.values.ravel() for box in boxes])
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert draw_erased(40, 0.0, rng) is None
