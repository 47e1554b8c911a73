"""SCG: regions from clustered self-supervised features, named by a frozen CLIP with one learned token per cluster.

A frozen DINO's tokens are assigned to the clusters of one codebook for the whole data set; each cluster of a picture is
a region, and a token beside CLIP's class token reads it. What is learned, from the nouns of captions, is an offset per
cluster to CLIP's class token, and the temperature. At test a region has the name that its vector is nearest to.

Source: "Associating Spatially-Consistent Grouping with Text-supervised Semantic Segmentation" (arXiv 2304.01114); card
methods/scg.md. No code of it is public; what the paper leaves open follows the card (section 17), mostly as parameters.
Deviates: clusters come from k-means of the tower's tokens, without STEGO's head (`pipeline.caching.codebook`).
"""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pipeline.artifacts.files import BadInput
from pipeline.caching.codebook import read_codebook
from pipeline.datasets.region_batches import RegionTransform, collate
from pipeline.encoders import load_clip, load_dino
from pipeline.methods.scg.config import Config
from pipeline.methods.scg.model import IMAGE_SIDE, SCG
from pipeline.nn.text import Vocabulary
from pipeline.training.phases import Phase, TrainingData

__all__ = ["Config", "ENCODERS", "GIVEN", "SCG", "TARGETS", "attach", "build", "phases", "start", "vocabulary"]

TARGETS = ("groups", "codebook")
ENCODERS = ("dino", "clip")
GIVEN = ("centroids",)


def vocabulary(config: Config, data: TrainingData) -> Vocabulary | None:
    """There is no text tower to shrink."""
    return None


def build(config: Config, vocabulary: Vocabulary | None) -> SCG:
    """The model with offsets of zero, without towers."""
    return SCG(config)


def start(model: SCG, config: Config, encoders: Path) -> None:
    """The temperature starts at CLIP's; where all of its image side is tuned, a copy of that is taken."""
    clip: Any = load_clip(encoders / "clip")
    with torch.no_grad():
        model.temperature.log_scale.fill_(math.log(clip.logit_scale))
    if config.regions.tune == "all":
        for name, value in clip.named_parameters():
            if name.startswith(IMAGE_SIDE):
                model.tuned[name.replace(".", "/")] = nn.Parameter(value.detach().clone())


def attach(model: SCG, encoders: Path) -> None:
    """Lend the towers.

    Raises:
        BadInput: they do not fit each other or the config.
    """
    clip, dino = load_clip(encoders / "clip"), load_dino(encoders / "dino")
    try:
        model.lend(clip, dino)
    except ValueError as error:
        raise BadInput(
            encoders, str(error), "Change params.yaml, or obtain other towers: `dvc repro encoders`"
        ) from error


def phases(model: SCG, config: Config, data: TrainingData) -> list[Phase]:
    """The only one, or none where nothing is tuned. The codebook goes into the model.

    Raises:
        BadInput: the codebook has another shape than the config says.
    """
    assert data.codebook is not None
    centroids = torch.from_numpy(read_codebook(data.codebook))
    if centroids.shape != model.centroids.shape:
        found = f"has {centroids.shape[0]} clusters of width {centroids.shape[1]}"
        raise BadInput(data.codebook, found, "Set train.scg.grouping.clusters and feature_dim to them")
    model.centroids.copy_(centroids)
    if config.regions.tune == "none":
        return []
    grid = config.views.image_size // model.dino.patch_size
    stop = frozenset(config.nouns.stop_nouns)
    prepare = RegionTransform(views=config.views, grid=grid, max_nouns=config.nouns.max_nouns, stop_nouns=stop)
    return [Phase(optimisation=config.optimisation, prepare=prepare, collate=collate, loss=lambda b, _: model.loss(b))]
