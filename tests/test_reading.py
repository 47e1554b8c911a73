"""What a model reads of windows is read in batches and remembered; answers are those of one window at a time."""

import groupvit_cases
import numpy as np
import ovsegmentor_cases
import pytest
import sseg_cases
import torch
import zeroseg_cases
from fake_towers import FakeClip

from pipeline import inference
from pipeline.baselines.clip_patches import ClipPatches
from pipeline.inference import BACKGROUNDS, Geometry, Segmenter, same_size
from pipeline.nn.grouped_clip import GroupedClip
from pipeline.nn.region_clip import RegionClip, average_vectors

HALVES = torch.arange(32).div(16, rounding_mode="floor").repeat(32, 1)


def zeroseg_with_clip():
    model = zeroseg_cases.model()
    model.lend(zeroseg_cases.clip())
    return model


MODELS = {
    "groupvit": groupvit_cases.model,
    "ovsegmentor": ovsegmentor_cases.model,
    "zeroseg": zeroseg_with_clip,
    "sseg": sseg_cases.model,
    "clip_patches": lambda: ClipPatches(FakeClip()),
    "grouped_clip": lambda: GroupedClip(FakeClip(), lambda tokens, seed: torch.arange(len(tokens)) % 3),
    "region_clip": lambda: RegionClip(
        FakeClip(), lambda image: HALVES, lambda pixels, masks: average_vectors(FakeClip(), pixels, masks)
    ),
}


def made(name):
    model = MODELS[name]()
    return model.eval().requires_grad_(False) if isinstance(model, torch.nn.Module) else model


def windows(count: int, height: int = 32, width: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(3))


def count_reads(model, monkeypatch) -> list[int]:
    """How many windows each call of `_read` saw."""
    sizes, real = [], model._read
    monkeypatch.setattr(model, "_read", lambda pixels: sizes.append(len(pixels)) or real(pixels))
    return sizes


def words(model, count: int = 4) -> torch.Tensor:
    with torch.no_grad():
        return model.encode_text([f"a photo of {'x' * number}" for number in range(count)])


@pytest.mark.parametrize("name", MODELS)
def test_windows_read_together_answer_as_alone(name, monkeypatch):
    model, pixels = made(name), windows(3)
    classes = words(model)
    with torch.no_grad():  # outside of inference mode nothing is remembered
        alone = [model.segment(window, classes) for window in pixels.split(1)]
        regions = [model.regions(window) for window in pixels.split(1) if hasattr(model, "regions")]
    sizes = count_reads(model, monkeypatch)
    with torch.inference_mode():
        model.read(pixels)
        for window, scores in zip(pixels.split(1), alone, strict=True):
            torch.testing.assert_close(model.segment(window, classes), scores, atol=1e-5, rtol=1e-4)
        found = [model.regions(window) for window in pixels.split(1) if hasattr(model, "regions")]
        assert all(torch.equal(one, other) for one, other in zip(found, regions, strict=True))
        assert sizes == [3], "all is remembered"
        model.read(torch.cat([pixels[:2], windows(4)[3:]]))
        assert sizes == [3, 1], "what is known is not read again"
        model.forget()
        model.segment(pixels[:1], classes)
    assert sizes == [3, 1, 1]


def test_a_training_forgets():
    model, pixels = made("groupvit"), windows(1)
    classes = words(model)
    with torch.inference_mode():
        before = model.segment(pixels, classes)
    model.train()
    with torch.no_grad():
        for weights in model.image.parameters():
            weights.add_(0.3 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(1)))
    model.eval()
    with torch.inference_mode():
        assert not torch.allclose(model.segment(pixels, classes), before, atol=1e-4)


def test_pictures_of_several_sizes_in_a_few_forward_passes(monkeypatch):
    """Three windows of 32 x 32 and two of 24 x 32 in two passes; a small limit reads fewer ahead, same answers."""
    model, rng = made("sseg"), np.random.default_rng(0)
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in ((32, 48), (24, 32), (32, 32), (24, 32))]
    segmenter = Segmenter(
        model,
        words(model),
        num_foreground=4,
        has_background=True,
        geometry=Geometry(short_side=None, long_side=2048, window=32, stride=16, multiple=8, antialias=True),
        background=BACKGROUNDS["max_probability"],
        device="cpu",
    )
    alone = [segmenter(image) for image in images]
    for limit, expected in ((1 << 20, [3, 2]), (2 * 32 * 32, [2, 1, 1, 1]), (1, [1] * 5)):
        monkeypatch.setattr(inference, "PIXELS_AT_ONCE", limit)
        model.forget()
        with monkeypatch.context() as patch:
            sizes = count_reads(model, patch)
            found = list(segmenter.many(images))
        assert sizes == expected
        for (best, labels), (single, single_labels) in zip(found, alone, strict=True):
            torch.testing.assert_close(best, single, atol=1e-5, rtol=1e-4)
            assert (labels == single_labels).float().mean() > 0.99, "but for ties"


def test_pictures_are_sorted_by_size():
    shapes = [(1, 3, 8, 8), (1, 3, 8, 16), (1, 3, 8, 8), (1, 3, 8, 8)]
    assert list(same_size([torch.zeros(shape) for shape in shapes], 128)) == [[0, 2], [3], [1]]
    assert list(same_size([], 128)) == []
