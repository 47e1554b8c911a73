"""The upper bound of the pseudo-masks: each image's DINO clusters, named by the true masks.

Regions are made by the features and pseudo_masks stages' own functions and parameters from the benchmark's images. The
score is that of the majority label per region; the report has best IoU beside it. Comparable only at equal k and grid.

Source: S-Seg card section 11 (Table 1).
"""

import hashlib
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from pipeline import encoders
from pipeline.artifacts.files import digest
from pipeline.artifacts.weights import model_digest
from pipeline.caching import features, pseudo_masks
from pipeline.datasets.benchmarks import Sample
from pipeline.inference import nearest
from pipeline.interfaces import PatchEncoder
from pipeline.metrics import oracle_labels
from pipeline.params import plain
from pipeline.project import Project


class PseudoMaskOracle:
    """A `LabelModel` that reads the truth, and a `RegionModel` that does not."""

    def __init__(
        self, dino: PatchEncoder, token_config: features.Config, mask_config: pseudo_masks.Config, device: str
    ) -> None:
        self.dino, self.token_config, self.mask_config, self.device = dino, token_config, mask_config, device

    @torch.inference_mode()
    def image_regions(self, image: UInt8[np.ndarray, "height width 3"]) -> Int64[Tensor, "height width"]:
        """The image's pseudo-masks at its own size (nearest). The seed is a hash of its pixels: it has no uid."""
        tokens = features.extract(self.dino, [image], self.token_config, self.device)
        name = hashlib.sha256(image.tobytes()).hexdigest()
        masks, _ = pseudo_masks.regions(tokens, [name], self.mask_config)
        return nearest(masks[0].long(), image.shape[:2])

    def label(self, sample: Sample, num_classes: int, ignore_index: int) -> Int64[Tensor, "height width"]:
        """Every region in the class of most of its pixels."""
        truth = torch.tensor(sample.label)
        return oracle_labels(self.image_regions(sample.image), truth, num_classes, "majority", ignore_index)


def digests(project: Project) -> dict[str, str]:
    """The encoder's weights, and the parameters that turn its tokens into regions."""
    dino = model_digest(project.encoder("dino"))
    configs = (project.config("features", features.Config), project.config("pseudo_masks", pseudo_masks.Config))
    return {"dino": dino, "pseudo_masks": digest([plain(config) for config in configs])}


def build(project: Project) -> PseudoMaskOracle:
    """The baseline around the project's DINO encoder, on its device."""
    device = project.machine.device
    token_config = project.config("features", features.Config)
    mask_config = project.config("pseudo_masks", pseudo_masks.Config)
    dino: Any = encoders.load_dino(project.encoder("dino"))  # a PatchEncoder that is a Module too
    return PseudoMaskOracle(dino.to(device), token_config, mask_config, device)
