"""A frozen CLIP as the harness's models use it.

Axes: tokens (patches, row-major), dim (of the joint space), texts, height/width in pixels.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.interfaces import ClipEncoder
from pipeline.nn.reading import WindowReader
from pipeline.nn.visual_tower import renormalised


class ClipReader(WindowReader):
    """The text half of a `ScoreModel`, and patches of ImageNet-normalised pixels."""

    def __init__(self, clip: ClipEncoder) -> None:
        super().__init__()
        self.clip, self.multiple = clip, clip.patch_size

    def encode_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """Unit text vectors."""
        return self.clip.encode_text(texts)

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit vectors of whole pictures."""
        return self.clip.encode_image(self.own_colours(pixels))

    def own_colours(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """From ImageNet's normalisation, which the harness gives, to the encoder's own."""
        return renormalised(pixels, self.clip.mean, self.clip.std)

    def patches(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch rows columns dim"]:
        """Unit vector of every patch."""
        return self.clip.encode_patches(self.own_colours(pixels)).float()


def unit_rows(x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
    """Rows of length 1."""
    return torch.nn.functional.normalize(x.float(), dim=-1)
