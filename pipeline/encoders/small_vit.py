"""The small trained image tower: its parameters, and its face as a frozen PatchEncoder.

Axes: batch, height/width (pixels), tokens (patches, row-major), dim.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from jaxtyping import Float
from torch import Tensor, nn

from pipeline import params
from pipeline.encoders.files import fit_weights
from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD, Facet
from pipeline.nn.vit import VisionTransformer
from pipeline.params import Range

FAMILY = "trained_dino"
Count = Annotated[int, Range(1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerConfig:
    """A small vision transformer.

    Attributes:
        image_size: side of its usual input, pixels; the size of the learned position grid.
        first_stride: of the first convolution, pixels. Each further width halves the grid again.
        widths: channels of the residual stem; empty is a plain patch embedding.
        dim: width of the transformer.
        layers: of the transformer.
        heads: of its attention.
    """

    image_size: Count
    first_stride: Count
    widths: tuple[int, ...]
    dim: Count
    layers: Annotated[int, Range(0)]
    heads: Count

    def build(self) -> VisionTransformer:
        """The tower with fresh weights."""
        return VisionTransformer(
            first_stride=self.first_stride,
            widths=self.widths,
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            image_size=self.image_size,
        )


class TrainedPatchEncoder(nn.Module):
    """The momentum teacher of our own self-distillation as a PatchEncoder."""

    def __init__(self, tower: VisionTransformer) -> None:
        super().__init__()
        self.tower = tower
        self.patch_size, self.embed_dim = tower.patch_size, tower.embed_dim
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD

    def patch_tokens(
        self, pixels: Float[Tensor, "batch 3 height width"], facet: Facet
    ) -> Float[Tensor, "batch tokens dim"]:
        """See `pipeline.interfaces.PatchEncoder`."""
        return self.tower(pixels) if facet == "tokens" else self.tower.keys(pixels)


def load(state: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> TrainedPatchEncoder:
    """The encoder of a model folder."""
    encoder = TrainedPatchEncoder(params.build(TowerConfig, config["architecture"], f"{folder}: architecture").build())
    fit_weights(encoder, state, folder)
    return encoder
