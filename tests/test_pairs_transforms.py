"""Joint transforms against torchvision, and pixels and masks that stay together."""

from dataclasses import replace
from random import Random

import numpy as np
import pytest
import torch
from pair_shards import painted, stored
from PIL import Image
from torchvision.transforms import functional as vision

from pipeline.datasets.batches import Augmentation, PairCollate, PairTransform
from pipeline.datasets.pairs import Sample
from pipeline.datasets.transforms import View, move_labels, normalise, random_view
from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD, OUTSIDE
from pipeline.text.tokenizers import BytePairTokenizer


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


@pytest.mark.parametrize(("side", "bias"), [(16, 0.05), (22, 0.05), (50, 0.25)])
def test_render_is_torchvisions_resized_crop_of_a_pillow_image(image, side, bias):
    """To one level, in a quarter of the values of noise; on average darker only where it enlarges."""
    view = View(left=6 / 40, top=3 / 30, width=20 / 40, height=24 / 30, flip=False)
    expected = vision.resized_crop(Image.fromarray(image), 3, 6, 24, 20, [side, side])
    shown = view.paint(image, np.empty((side, side, 3), np.uint8))
    assert shown.shape == (side, side, 3) and shown.dtype == np.uint8 and shown.flags.c_contiguous
    off = shown.astype(int) - np.asarray(expected)
    assert np.abs(off).max() <= 1 and (off != 0).mean() < 0.3 and abs(off.mean()) < bias
    flipped = View(view.left, view.top, view.width, view.height, flip=True)
    np.testing.assert_array_equal(flipped.paint(image, np.empty_like(shown)), shown[:, ::-1])


def test_normalise_is_torchvisions(image):
    expected = vision.normalize(vision.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD).permute(1, 2, 0)
    np.testing.assert_allclose(normalise(torch.tensor(image[None, :30, :30]))[0], expected.numpy()[:30, :30], atol=2e-6)


def test_normalise_rounds_as_numpy_does(image):
    """Weights trained on pixels that numpy normalised stay what they were, to the bit."""
    std, mean = (np.asarray(values, np.float32) for values in (IMAGENET_STD, IMAGENET_MEAN))
    square = image[None, :30, :30]
    expected = square * (np.float32(1 / 255) / std) - mean / std
    assert expected.dtype == np.float32 and np.array_equal(normalise(torch.tensor(square)).numpy(), expected)


def test_whole_view_at_its_own_resolution_is_the_label_map():
    labels = np.arange(12, dtype=np.uint8).reshape(3, 4)
    whole = View(left=0.0, top=0.0, width=1.0, height=1.0, flip=False)
    np.testing.assert_array_equal(move_labels(labels, whole, (3, 4)), labels)
    np.testing.assert_array_equal(move_labels(labels, whole, (6, 8)), labels.repeat(2, 0).repeat(2, 1))


def test_labels_by_hand():
    labels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    right_half = View(left=0.5, top=0.0, width=0.5, height=1.0, flip=False)
    np.testing.assert_array_equal(move_labels(labels, right_half, (2, 2)), [[6, 7], [14, 15]])
    np.testing.assert_array_equal(move_labels(labels, View(0.5, 0.0, 0.5, 1.0, flip=True), (4, 2)), labels[:, [3, 2]])
    past = View(left=0.75, top=-0.25, width=0.5, height=0.5, flip=False)
    np.testing.assert_array_equal(move_labels(labels, past, (2, 2)), [[OUTSIDE, OUTSIDE], [3, OUTSIDE]])


def test_masks_move_with_the_pixels():
    """A picture painted with its own label map: wherever the view looks, the colour under a label is that label's."""
    rng = Random(2)
    labels = np.array(rng.choices(range(6), k=16), np.uint8).reshape(4, 4)
    blocks = np.kron(labels, np.ones((32, 32), np.uint8))[..., None].repeat(3, 2) * 40
    for _ in range(50):
        view = random_view(rng, height=128, width=128, scale=(0.2, 1.0), ratio=(0.75, 1.33), flip_chance=0.5)
        seen = view.paint(blocks, np.empty((64, 64, 3), np.uint8))
        moved = move_labels(labels, view, (16, 16))
        centres = seen.reshape(16, 4, 16, 4, 3)[:, 1:3, :, 1:3].mean(axis=(1, 3, 4)) / 40
        assert (np.abs(centres - moved) < 0.5).mean() > 0.85, "most cells lie inside one label"
        flat = np.abs(centres - centres.round()) < 0.02
        assert (centres.round()[flat] == moved[flat]).mean() > 0.95


def test_random_view_bounds():
    rng = Random(2)
    settings = {"height": 60, "width": 90, "scale": (0.2, 0.5), "ratio": (0.8, 1.25), "flip_chance": 0.3}
    views = [random_view(rng, **settings) for _ in range(400)]
    areas = np.array([v.width * v.height for v in views])
    aspects = np.array([v.width * 90 / (v.height * 60) for v in views])
    assert areas.min() > 0.19 and areas.max() < 0.52 and abs(areas.mean() - 0.35) < 0.02
    assert aspects.min() > 0.76 and aspects.max() < 1.3
    assert all(
        0 <= v.left <= v.left + v.width <= 1 + 1e-9 and 0 <= v.top <= v.top + v.height <= 1 + 1e-9 for v in views
    )
    assert 0.2 < np.mean([v.flip for v in views]) < 0.4


def test_images_too_narrow_for_the_ratio_are_cropped_at_the_centre():
    view = random_view(Random(0), height=100, width=5, scale=(0.9, 1.0), ratio=(0.8, 1.25), flip_chance=0.0)
    assert (view.width, view.height) == (1.0, 0.06) and view.top == pytest.approx(0.47)


def sample(captions, nouns=("dog",)):
    return Sample("u", captions, list(nouns), [], stored((20, 20)), np.zeros((4, 4), np.uint8))


def augmentation(**changes):
    settings = {"image_size": 16, "crop_scale": (0.5, 1.0), "crop_ratio": (0.8, 1.25), "flip_chance": 0.5}
    return Augmentation(**(settings | {"caption_form": "caption"} | changes))


def test_transform_is_a_function_of_its_generator():
    transform = PairTransform(views=augmentation(), grid=4)
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    drawn = [transform(sample(["a", "b", "c"]), Random(5)) for _ in range(2)]
    one, two = (row.item for row in drawn)
    assert one.caption == two.caption and (one.regions == two.regions).all()
    first, second = painted(drawn, [image, image])["pixels"].images
    assert torch.equal(first, second)
    captions = {transform(sample(["a", "b", "c"]), Random(i)).item.caption for i in range(30)}
    assert captions == {"a", "b", "c"}


def test_caption_form():
    transform = PairTransform(views=augmentation(), grid=4, caption_form="nouns")
    assert transform(sample(["a dog on a mat"], ("dog", "mat")), Random(0)).item.caption == "dog mat"
    assert transform(sample(["so it goes"], ()), Random(0)).item.caption == "so it goes"


def test_collate():
    transform, collate = PairTransform(views=augmentation(), grid=4), PairCollate(BytePairTokenizer(8))
    drawn = [transform(sample(["a dog"]), Random(i)) for i in range(3)]
    shown = painted(drawn, [np.zeros((20, 20, 3), np.uint8)] * 3)
    batch = collate([row.item for row in drawn], ["x", "y", "z"], shown).to("cpu")
    assert batch.pixels.shape == (3, 3, 16, 16) and batch.pixels.dtype == torch.float32
    assert batch.token_ids.shape == (3, 8) and batch.uids == ["x", "y", "z"] and batch.captions == ["a dog"] * 3
    assert batch.regions is not None and batch.regions.shape == (3, 4, 4) and batch.regions.dtype == torch.uint8
    black = -torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(batch.pixels[0, :, 3, 5], black)


def test_a_batch_has_the_pseudo_masks_of_all_its_images_or_of_none():
    """Those of some would be taken for those of its first images."""
    transform, collate = PairTransform(views=augmentation(), grid=4), PairCollate(BytePairTokenizer(8))
    masked = transform(sample(["a dog"]), Random(0)).item
    bare = replace(masked, regions=None)
    assert collate([bare, bare], ["x", "y"], {}).others["regions"] is None
    with pytest.raises(ValueError, match="1 of 3 images of a batch have no pseudo-masks"):
        collate([masked, bare, masked], ["x", "y", "z"], {})
