"""MaskCLIP: a CLIP's last attention left out, so that every patch says on its own what it shows.

Axes: tokens (patches, row-major), inner (of the tower), dim (of the joint space), classes, rows x columns (patch grid).

Source: "Extract Free Dense Labels from CLIP" (Zhou et al., ECCV 2022), 3.2 and 3.3, and its release; SCG card 11.
Deviates: the release runs the tower with GELU, LayerNorm eps 1e-6 and ImageNet's mean and std; here with its own.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pipeline.interfaces import ClipEncoder, VisualTower
from pipeline.nn.clip_reader import ClipReader, unit_rows
from pipeline.nn.visual_tower import step, value_tokens, whole_patches

# Over what a key is normalised: its own channels (the paper's cosine) or, channel by channel, all tokens (the release,
# whose call normalises the default axis of a [batch, tokens, inner] tensor).
KeyAxis = Literal["channels", "tokens"]
# Source: release, the score of a class that prompt denoising drops, beside cosines.
DROPPED = -100.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Refinement:
    """What the release calls refining; None leaves a step out, as its shipped configs do.

    Attributes:
        key_smoothing: patches whose best probability is below this take the predictions of patches with like keys
            (`ks_thresh`; 1: all patches).
        key_axis: see `KeyAxis`.
        prompt_denoising: classes whose best probability anywhere in the window is below this are dropped (`pd_thresh`).
    """

    key_smoothing: float | None
    key_axis: KeyAxis
    prompt_denoising: float | None


UNREFINED = Refinement(key_smoothing=None, key_axis="channels", prompt_denoising=None)


def bare_value_tokens(
    tower: VisualTower, pixels: Float[Tensor, "batch 3 height width"]
) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch tokens inner"]]:
    """As `value_tokens`, without the last layer's residual and MLP: what its values say alone.

    Source: ClearCLIP and NACLIP, which find that this is the largest gain (card 11); not MaskCLIP.
    """
    x = tower.embed(pixels)
    for layer in tower.layers[:-1]:
        x = step(layer, x)
    last = tower.layers[-1]
    _, keys, values = last.qkv(x)
    return tower.project(last.attended(values))[:, 1:], keys[:, 1:]


def denoise_prompts(
    cosines: Float[Tensor, "tokens classes"], scale: float, threshold: float
) -> Float[Tensor, "tokens classes"]:
    """The cosines, with `DROPPED` for classes that are nowhere likely; with all dropped they are all equal."""
    best = (scale * cosines).softmax(1).amax(0)
    return cosines.masked_fill(best < threshold, DROPPED)


def smooth_keys(
    scores: Float[Tensor, "tokens classes"], keys: Float[Tensor, "tokens inner"], threshold: float, axis: KeyAxis
) -> Float[Tensor, "tokens classes"]:
    """Unsure patches take the sum of all predictions, weighted by the likeness of their keys.

    Deviates: the weights are scaled to an absolute sum of 1, which keeps scores at most 1 (for the background
    threshold) and every patch's order of classes. The release's ViT keys have passed the out-projection; here not.
    """
    unit = F.normalize(keys.float(), dim=1 if axis == "channels" else 0)
    weights = unit @ unit.T
    smoothed = weights @ scores / weights.abs().sum(1, keepdim=True)
    return torch.where(scores.amax(1, keepdim=True) < threshold, smoothed, scores)


class MaskClip(ClipReader):
    """A `ScoreModel` around a CLIP with a class token.

    `scale` multiplies cosines before the softmax; None is the CLIP's own. `bare`: see `bare_value_tokens`.

    Raises:
        ValueError: its tower cannot be taken apart.
    """

    def __init__(self, clip: ClipEncoder, scale: float | None, refinement: Refinement, *, bare: bool) -> None:
        super().__init__(clip)
        self.tower, self.refinement = clip.visual_tower(), refinement
        self.scale = clip.logit_scale if scale is None else scale
        self.last_values = bare_value_tokens if bare else value_tokens

    @property
    def one_softmax(self) -> bool:
        """Whether nothing is refined: smoothing mixes patches, denoising drops words."""
        return self.refinement.key_smoothing is None and self.refinement.prompt_denoising is None

    def segment(
        self, pixels: Float[Tensor, "1 3 height width"], class_embeddings: Float[Tensor, "classes dim"]
    ) -> Float[Tensor, "classes rows columns"]:
        """Probability of each class per patch, refined."""
        grid, refinement = whole_patches(pixels, self.tower.patch_size), self.refinement
        values, keys = self.seen(pixels)
        cosines = unit_rows(values) @ class_embeddings.float().T
        if refinement.prompt_denoising is not None:
            cosines = denoise_prompts(cosines, self.scale, refinement.prompt_denoising)
        scores = (self.scale * cosines).softmax(1)
        if refinement.key_smoothing is not None:
            scores = smooth_keys(scores, keys, refinement.key_smoothing, refinement.key_axis)
        return scores.T.unflatten(1, grid)

    def _read(
        self, pixels: Float[Tensor, "windows 3 height width"]
    ) -> list[tuple[Float[Tensor, "tokens dim"], Float[Tensor, "tokens inner"]]]:
        """Values and keys of the last attention."""
        return list(zip(*self.last_values(self.tower, self.own_colours(pixels)), strict=True))
