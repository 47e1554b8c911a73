"""The frozen CLIP encoder's patch embeddings against the class names: what the image tower knows without any mask.

Every patch is classified on its own: softmax over classes of the scaled cosine. No paper's method; S-Seg's table calls
the same idea "CLIP" (13.5 / 8.1 / 5.9 with background there). Scores are probabilities over the words asked for.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline import encoders
from pipeline.artifacts.weights import model_digest
from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD, ClipEncoder
from pipeline.project import Project


class ClipPatches:
    """A `ScoreModel` around a CLIP encoder."""

    def __init__(self, clip: ClipEncoder, device: str) -> None:
        self.clip = clip
        column = [torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (clip.mean, clip.std)]
        imagenet = [torch.tensor(v, device=device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD)]
        # From ImageNet's normalisation, which the harness gives, to the encoder's own.
        self.scale, self.shift = imagenet[1] / column[1], (imagenet[0] - column[0]) / column[1]

    def encode_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """Unit text vectors."""
        return self.clip.encode_text(texts)

    def segment(
        self, pixels: Float[Tensor, "1 3 height width"], class_embeddings: Float[Tensor, "classes dim"]
    ) -> Float[Tensor, "classes grid_h grid_w"]:
        """Probability of each class per patch."""
        patches = self.clip.encode_patches(pixels * self.scale + self.shift)[0].float()
        cosine = torch.einsum("hwd,cd->chw", patches, class_embeddings)
        return (self.clip.logit_scale * cosine).softmax(0)


def digests(project: Project) -> dict[str, str]:
    """The encoder's weights."""
    return {"clip": model_digest(project.encoder("clip"))}


def build(project: Project) -> ClipPatches:
    """The baseline around the project's CLIP encoder, on its device."""
    clip: Any = encoders.load_clip(project.encoder("clip"))  # a ClipEncoder that is a Module too
    return ClipPatches(clip.to(project.machine.device), project.machine.device)
