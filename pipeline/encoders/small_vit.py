"""The small trained image tower: its parameters, and its face as a frozen PatchEncoder.

Axes: batch, height/width (pixels), tokens (patches, row-major), length (tokens with the class token before them), dim.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from jaxtyping import Float
from torch import Tensor, nn

from pipeline import params
from pipeline.encoders.files import fit_weights
from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD, Facet, Layer, VisualTower
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
        class_token: whether a class token goes before the patches.
    """

    image_size: Count
    first_stride: Count
    widths: tuple[int, ...]
    dim: Count
    layers: Annotated[int, Range(0)]
    heads: Count
    class_token: bool

    def build(self) -> VisionTransformer:
        """The tower with fresh weights."""
        return VisionTransformer(
            first_stride=self.first_stride,
            widths=self.widths,
            dim=self.dim,
            layers=self.layers,
            heads=self.heads,
            image_size=self.image_size,
            class_token=self.class_token,
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

    @property
    def prefix(self) -> int:
        """Tokens before the patches: 1 or 0."""
        return self.tower.prefix

    def all_tokens(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch length dim"]:
        """Class token, where there is one, and patch tokens after the final LayerNorm."""
        return self.tower.all_tokens(pixels)

    def visual_tower(self, head: nn.Module) -> VisualTower:
        """The transformer taken apart, with `head` after its final norm.

        Raises:
            ValueError: it has no class token.
        """
        return SmallTower(self.tower, head)


class SmallTower:
    """A `VisualTower` around the small transformer and a head."""

    def __init__(self, tower: VisionTransformer, head: nn.Module) -> None:
        if tower.class_token is None:
            raise ValueError("the tower has no class token: train it with class_token: true")
        self.tower, self.head, self.patch_size = tower, head, tower.patch_size
        self.class_start: Tensor = tower.class_token

    @property
    def layers(self) -> Sequence[Layer]:
        """See `VisualTower`."""
        return list(self.tower.blocks)  # type: ignore[arg-type]

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch length inner"]:
        """See `VisualTower`."""
        return self.tower.embed(pixels)

    def project(self, x: Float[Tensor, "batch length inner"]) -> Float[Tensor, "batch length dim"]:
        """See `VisualTower`."""
        return self.head(self.tower.norm(x))


def load(state: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path) -> TrainedPatchEncoder:
    """The encoder of a model folder."""
    encoder = TrainedPatchEncoder(params.build(TowerConfig, config["architecture"], f"{folder}: architecture").build())
    fit_weights(encoder, state, folder)
    return encoder
