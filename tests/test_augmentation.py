"""RandAugment and random erasing against timm, operation by operation, and their distribution."""

import random
from random import Random

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kstest
from sklearn.datasets import load_sample_image
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP, rand_augment_transform

from pipeline.datasets import augmentation, operations
from pipeline.datasets.augmentation import OPERATIONS, Operation, changed, draw_erased, draw_operations, noise
from pipeline.datasets.looks import Erased
from pipeline.datasets.pixels import Pixels

# What is not exactly timm's: moved pixels, and what is computed in floats.
MOVES = {"Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel"}
ROUNDED = {f"{name}Increasing" for name in ("Color", "Contrast", "Brightness", "Sharpness")} | {"AutoContrast"}


def picture(seed: int = 0) -> np.ndarray:
    smooth = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(smooth).resize((32, 32), Image.Resampling.BICUBIC))


def test_the_operations_are_those_of_the_policy():
    theirs = rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": operations.FILL})
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
        assert OPERATIONS[name].arguments(level / 10, sign) == pytest.approx(theirs)


def timms(name: str, pixels: np.ndarray, arguments: tuple) -> np.ndarray:
    operation = NAME_TO_OP[name]
    moved = {"fillcolor": operations.FILL, "resample": Image.Resampling.BILINEAR}
    return np.asarray(operation(Image.fromarray(pixels), *arguments, **moved))


def photographs() -> list[np.ndarray]:
    """scikit-learn's two, in the size of a view and in an odd one."""
    whole = [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    return [np.asarray(image.resize(size)) for image in whole for size in ((224, 224), (61, 90))]


def grids() -> list[np.ndarray]:
    """One colour; too few pixels to equalise; more values than are equalised into [0, 255]; few values."""
    rng = np.random.default_rng(0)
    grid = rng.integers(0, 256, (18, 31, 3), dtype=np.uint8)
    return [np.full((9, 12, 3), (0, 77, 255), np.uint8), grid[:9, :12], grid, grid // 64 * 50 + 3]


@pytest.mark.parametrize(("strength", "sign"), [(0.0, 1), (0.37, -1), (0.9, 1), (0.9, -1), (1.0, 1)])
@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_timms(name, strength, sign):
    operation = OPERATIONS[name]
    arguments = operation.arguments(strength, sign)
    for pixels in photographs() + grids() * (name not in MOVES):
        before = pixels.copy()
        ours, theirs = operation.apply(pixels, *arguments), timms(name, pixels, arguments)
        assert ours.dtype == np.uint8 and np.array_equal(pixels, before)
        off = np.abs(ours.astype(int) - theirs)
        if name in MOVES:
            # Grey levels. A picture that lies a quarter of a pixel beside has a mean from 1.0 on and a quantile of 14.
            assert off.mean() < 1 and np.quantile(off, 0.95) <= 1
        else:
            assert off.max() <= (name in ROUNDED)


def test_the_same_generator_gives_the_same_view_and_the_input_stays():
    image = picture()
    before = image.copy()
    views = [changed(image, draw_operations(2, Random(seed))) for seed in (1, 1, 2, 3, 4)]
    assert np.array_equal(views[0], views[1]) and np.array_equal(image, before)
    assert len({view.tobytes() for view in views}) > 2
    assert draw_operations(0, Random(0)) == []


def test_half_of_the_operations_run(monkeypatch):
    ran = []
    for name in OPERATIONS:
        watched = Operation(lambda pixels, *_, name=name: ran.append(name) or pixels, OPERATIONS[name].arguments)
        monkeypatch.setitem(OPERATIONS, name, watched)
    rng, image = Random(0), picture()
    for _ in range(1500):
        changed(image, draw_operations(2, rng))
    assert 1500 * 0.94 < len(ran) < 1500 * 1.06
    counts = [ran.count(name) for name in OPERATIONS]
    assert min(counts) > 70 and max(counts) < 135, "100 of each are expected"


def test_a_batch_is_erased_after_it_is_normalised():
    box = Erased(top=2, left=3, height=4, width=5, first=1000)
    views = torch.from_numpy(np.stack([picture(seed) for seed in (0, 1)]))
    pixels, plain = (Pixels(views, [None, erased]).to("cpu") for erased in (box, None))
    inside = torch.zeros(32, 32, dtype=torch.bool)
    inside[2:6, 3:8] = True
    assert torch.equal(pixels[0], plain[0])
    assert torch.equal(pixels[1, :, inside].T.flatten(), noise("cpu")[1000:1060])
    assert torch.equal(pixels[1, :, ~inside], plain[1, :, ~inside])


def test_erasing_has_its_chance_and_its_share():
    rng = Random(0)
    found = [draw_erased(40, 0.25, rng) for _ in range(2000)]
    boxes = [box for box in found if box is not None]
    assert 0.22 < len(boxes) / 2000 < 0.28
    shares = [box.height * box.width / 1600 for box in boxes]
    assert 0.015 < min(shares) and max(shares) < 0.36 and 0.14 < np.mean(shares) < 0.20
    assert all(box.top + box.height <= 40 and box.left + box.width <= 40 for box in boxes)
    assert all(0 <= box.first and box.first + box.height * box.width * 3 <= augmentation.NOISE for box in boxes)
    assert len({box.first for box in boxes}) == len(boxes)
    assert draw_erased(40, 0.0, rng) is None


def test_the_noise_is_normal():
    values = noise("cpu").numpy()
    assert len(values) == augmentation.NOISE and abs(values.mean()) < 0.002 and abs(values.std() - 1) < 0.002
    assert kstest(values[:50_000], "norm").pvalue > 0.01
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.002
