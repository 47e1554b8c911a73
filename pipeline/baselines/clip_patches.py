"""The frozen CLIP encoder's patch embeddings against the class names: what the image tower knows without any mask.

Every patch is classified on its own: softmax over classes of the scaled cosine. It is the pixel-wise row of GroupViT's
Table 4 (20.1 on VOC there); S-Seg's tables call the same idea "CLIP" (13.5 / 8.1 / 5.9 with background). Scores are
probabilities over the words asked for.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.artifacts.weights import model_digest
from pipeline.baselines import project_clip
from pipeline.nn.clip_reader import ClipReader
from pipeline.project import Project


class ClipPatches(ClipReader):
    """A `ScoreModel` around a CLIP encoder."""

    one_softmax = True

    def segment(
        self, pixels: Float[Tensor, "1 3 height width"], class_embeddings: Float[Tensor, "classes dim"]
    ) -> Float[Tensor, "classes grid_h grid_w"]:
        """Probability of each class per patch."""
        (patches,) = self.seen(pixels)
        cosine = torch.einsum("hwd,cd->chw", patches, class_embeddings)
        return (self.clip.logit_scale * cosine).softmax(0)

    def _read(self, pixels: Float[Tensor, "windows 3 height width"]) -> list[tuple[Float[Tensor, "grid_h grid_w dim"]]]:
        """Unit vectors of the patches."""
        return [(patches,) for patches in self.patches(pixels)]


def digests(project: Project) -> dict[str, str]:
    """The encoder's weights."""
    return {"clip": model_digest(project.encoder("clip"))}


def build(project: Project) -> ClipPatches:
    """The baseline around the project's CLIP encoder, on its device."""
    return ClipPatches(project_clip(project))
