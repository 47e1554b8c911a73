"""Pseudo-masks of pictures outside any shard, by the functions and parameters of stages features and pseudo_masks."""

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from pipeline import encoders
from pipeline.artifacts.files import digest
from pipeline.artifacts.weights import model_digest
from pipeline.caching import features, pseudo_masks
from pipeline.inference import nearest
from pipeline.interfaces import PatchEncoder
from pipeline.nn.reading import Memory
from pipeline.params import plain
from pipeline.project import Project


class ImageMasks:
    """A picture's pseudo-masks at its own size (nearest), computed once; seeded by its pixels, for it has no uid."""

    def __init__(
        self, dino: PatchEncoder, token_config: features.Config, mask_config: pseudo_masks.Config, device: str
    ) -> None:
        self.dino, self.token_config, self.mask_config, self.device = dino, token_config, mask_config, device
        self.memory = Memory()

    @torch.inference_mode()
    def __call__(self, image: UInt8[np.ndarray, "height width 3"]) -> Int64[Tensor, "height width"]:
        """Region ids in reading order."""
        (grid,) = self.memory.recall(torch.tensor(image), lambda: (self._grid(image),))
        return nearest(grid.long(), image.shape[:2])

    def _grid(self, image: UInt8[np.ndarray, "height width 3"]) -> UInt8[Tensor, "rows columns"]:
        tokens = features.extract(self.dino, [image], self.token_config, self.device)
        name = hashlib.sha256(image.tobytes()).hexdigest()
        masks, _ = pseudo_masks.regions(tokens, [name], self.mask_config)
        return masks[0]


def digests(project: Project) -> dict[str, str]:
    """The encoder's weights, and the parameters that turn its tokens into regions.

    Raises:
        BadInput: there is no encoder.
    """
    dino = model_digest(project.encoder("dino"))
    tokens = plain(project.config("features", features.Config))
    del tokens["store"]  # nothing is stored here
    masks = plain(project.config("pseudo_masks", pseudo_masks.Config))
    return {"dino": dino, "pseudo_masks": digest([tokens, masks])}


def load(project: Project) -> ImageMasks:
    """Around the project's DINO encoder, on its device; the same one for all baselines of a process, and its memory.

    Raises:
        BadInput: there is none.
    """
    token_config = project.config("features", features.Config)
    mask_config = project.config("pseudo_masks", pseudo_masks.Config)
    folder = project.encoder("dino")
    return _load(folder, model_digest(folder), token_config, mask_config, project.machine.device)


@lru_cache(maxsize=1)
def _load(
    folder: Path, digest: str, token_config: features.Config, mask_config: pseudo_masks.Config, device: str
) -> ImageMasks:
    """`digest` stands for the folder's contents."""
    dino: Any = encoders.load_dino(folder)  # a PatchEncoder that is a Module too
    return ImageMasks(dino.to(device), token_config, mask_config, device)
