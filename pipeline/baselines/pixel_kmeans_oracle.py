"""What clustering pixels by colour would bound: k-means of the shrunk image, named by the true masks (S-Seg Table 1).

49.5 on VOC and 43.3 on Context there, at an eighth of the image's sides; `k` is that of the pseudo-masks. Colours only:
the paper does not speak of positions.
"""

from dataclasses import dataclass
from typing import Annotated

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from pipeline.baselines import RegionOracle, num_regions, pixel_digests
from pipeline.clustering import kmeans
from pipeline.inference import nearest
from pipeline.nn.reading import seed_of
from pipeline.nn.token_groups import shrunk_colours
from pipeline.params import Range
from pipeline.project import Project

BLOCK = "baselines.pixel_kmeans_oracle"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Block `baselines.pixel_kmeans_oracle`.

    Attributes:
        shrink: the image's sides are divided by this.
        iters: k-means iterations, at most.
    """

    shrink: Annotated[int, Range(1)]
    iters: Annotated[int, Range(1)]


def digests(project: Project) -> dict[str, str]:
    """The parameters: there are no weights."""
    return pixel_digests(project, BLOCK, Config)


def build(project: Project) -> RegionOracle:
    """The baseline; it runs on the CPU."""
    config, k = project.config(BLOCK, Config), num_regions(project)

    def image_regions(image: UInt8[np.ndarray, "height width 3"]) -> Int64[Tensor, "height width"]:
        colours = shrunk_colours(torch.tensor(image), config.shrink)
        seeds = torch.tensor([seed_of(colours)])
        labels, _ = kmeans(colours.flatten(0, 1)[None], k, iters=config.iters, metric="euclidean", seeds=seeds)
        return nearest(labels.view(colours.shape[:2]), image.shape[:2])

    return RegionOracle(image_regions)
