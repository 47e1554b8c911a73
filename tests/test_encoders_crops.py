"""Views of self-distillation: colours against torchvision, shared points against geometry, sizes."""

from random import Random

import numpy as np
import pytest
import torch
from encoders_cases import DINO, dino_config
from pair_shards import painted, stored

from pipeline.datasets.pairs import Sample
from pipeline.datasets.transforms import View
from pipeline.encoders.crops import MultiCrop, collate_crops, recolour, shared_points
from pipeline.params import ParamsError


def test_recolour_equals_torchvision():
    from torchvision.transforms import functional as tv

    images = np.random.default_rng(0).integers(80, 150, (1, 2, 6, 6, 3), dtype=np.uint8)
    colours = np.array([[[1.1, 0.9, 1.2], [0.9, 1.1, 0.0]]], np.float32)
    found = recolour(images, colours)
    for row in range(2):
        image = torch.from_numpy(images[0, row]).permute(2, 0, 1).float() / 255
        brightness, contrast, saturation = (float(c) for c in colours[0, row])
        image = tv.adjust_saturation(tv.adjust_contrast(tv.adjust_brightness(image, brightness), contrast), saturation)
        expected = tv.normalize(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]).permute(1, 2, 0)
        # torchvision's luma weights are rounded to 0.2989, 0.587, 0.114
        np.testing.assert_allclose(found[0, row], expected.numpy(), atol=2e-3)


def test_shared_points_show_the_same_place():
    """In an image whose colours are its coordinates, both views read the same colour at a shared point."""
    ramp = np.linspace(0, 255, 200).astype(np.uint8)
    image = np.stack([np.tile(ramp, (200, 1)), np.tile(ramp[:, None], (1, 200)), np.zeros((200, 200), np.uint8)], -1)
    first = View(left=0.1, top=0.0, width=0.8, height=0.7, flip=True)
    second = View(left=0.3, top=0.2, width=0.6, height=0.8, flip=False)
    points = shared_points(first, second, 50, Random(0))
    assert np.abs(points).max() <= 1
    read = []
    for view, place in zip((first, second), points, strict=True):
        shown = torch.from_numpy(view.paint(image, np.empty((128, 128, 3), np.uint8))).permute(2, 0, 1)[None].float()
        grid = torch.from_numpy(place)[None, None]
        read.append(torch.nn.functional.grid_sample(shown, grid, align_corners=False, padding_mode="border")[0, :2, 0])
    assert (read[0] - read[1]).abs().max() < 4
    assert read[0].std(dim=1).min() > 20, "the points are spread over the image"


def test_crops_have_their_sizes_and_depend_on_the_generator_alone():
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    batches = [made(dino_config().crops, image, (1, 2)) for _ in range(2)]
    assert batches[0].uids == ["0", "1"]
    assert batches[0].global_views.shape == (2, 2, 3, 16, 16) and batches[0].local_views.shape == (1, 2, 3, 8, 8)
    assert torch.equal(batches[0].global_views, batches[1].global_views)
    assert torch.equal(batches[0].points, batches[1].points)
    assert not torch.equal(batches[0].global_views[:, 0], batches[0].global_views[:, 1])


def made(config, image, seeds):
    """A batch of one image, drawn by several seeds."""
    sample = Sample("u", ["a"], [], [], stored(image.shape[:2]))
    drawn = [MultiCrop(config)(sample, Random(seed)) for seed in seeds]
    shown = painted(drawn, [image] * len(drawn))
    return collate_crops([row.item for row in drawn], [str(number) for number in range(len(drawn))], shown)


def test_no_local_views_and_no_common_place():
    settings = DINO["crops"] | {"num_local": 0}
    crops = made(dino_config(crops=settings).crops, np.zeros((20, 20, 3), np.uint8), (0,))
    assert len(crops.local_views) == 0 and crops.global_views.shape == (2, 1, 3, 16, 16)
    with pytest.raises(ParamsError, match="global_scale"):
        dino_config(crops=DINO["crops"] | {"global_scale": [0.3, 1.0]})
