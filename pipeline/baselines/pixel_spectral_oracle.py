"""What clustering pixels by colour would bound: normalised cuts of the shrunk image, named by the true masks.

49.2 on VOC and 43.2 on Context in S-Seg's Table 1, at an eighth of the image's sides; `k` is that of the pseudo-masks.
The affinity is a Gaussian of the colours' distance: the paper does not give one.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from pipeline.baselines import RegionOracle, num_regions, pixel_digests
from pipeline.inference import nearest
from pipeline.nn.token_groups import Assign, shrunk_colours, spectral
from pipeline.params import Range
from pipeline.project import Project

BLOCK = "baselines.pixel_spectral_oracle"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Block `baselines.pixel_spectral_oracle`.

    Attributes:
        shrink: the image's sides are divided by this.
        sigma: of the Gaussian, in colours of [0, 1].
        assign: how the spectral embedding becomes groups (scikit-learn's `assign_labels`).
    """

    shrink: Annotated[int, Range(1)]
    sigma: Annotated[float, Range(0, low_open=True)]
    assign: Assign


def digests(project: Project) -> dict[str, str]:
    """The parameters: there are no weights."""
    return pixel_digests(project, BLOCK, Config)


def build(project: Project) -> RegionOracle:
    """The baseline; it runs on the CPU."""
    config, k = project.config(BLOCK, Config), num_regions(project)

    def image_regions(image: UInt8[np.ndarray, "height width 3"]) -> Int64[Tensor, "height width"]:
        colours = shrunk_colours(torch.tensor(image), config.shrink)
        pixels = colours.flatten(0, 1)
        labels = spectral((-torch.cdist(pixels, pixels).square() / (2 * config.sigma**2)).exp(), k, config.assign)
        return nearest(labels.view(colours.shape[:2]), image.shape[:2])

    return RegionOracle(image_regions)
