"""What a model in training sees: a few of its images, each beside its regions."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from pipeline.artifacts.files import atomic_write
from pipeline.datasets.label_ids import PALETTE_SIZE, class_color
from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD

OPACITY = 0.6  # of a region's colour over the image


def save_regions(path: Path, model: Any, pixels: Float[Tensor, "batch 3 height width"]) -> None:
    """Write a PNG: the images in a row, below them the same under their regions' colours.

    `pixels` are normalised as a TrainBatch's. Neither the model nor a random state is changed.
    """
    modes = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng([pixels.device] if pixels.is_cuda else []), torch.no_grad():
        model.eval()
        labels = [_fitted(model.regions(image[None]), image.shape[1:]) for image in pixels]
    for module, training in modes:
        module.training = training
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    colours = ((pixels.float() * std + mean) * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    painted = [_paint(image, found.cpu().numpy()) for image, found in zip(colours, labels, strict=True)]
    sheet = np.concatenate([np.concatenate(list(colours), axis=1), np.concatenate(painted, axis=1)])
    output = io.BytesIO()
    Image.fromarray(sheet).save(output, "PNG")
    atomic_write(path, output.getvalue())


def _fitted(labels: Int64[Tensor, "rows columns"], size: torch.Size) -> Int64[Tensor, "height width"]:
    return F.interpolate(labels[None, None].float(), size=tuple(size), mode="nearest-exact")[0, 0].long()


def _paint(
    image: UInt8[np.ndarray, "height width 3"], labels: Int64[np.ndarray, "height width"]
) -> UInt8[np.ndarray, "height width 3"]:
    colours = np.array([class_color(index) for index in range(1, PALETTE_SIZE)])[labels % (PALETTE_SIZE - 1)]
    return ((1 - OPACITY) * image + OPACITY * colours).round().astype(np.uint8)
