"""A small CLIP whose patches live in the space of its texts: a convolutional ViT (or a frozen one) and a bag of words.

It reads an image in one or both of two ways. `smooth_maximum`: of its projected patches, channel by channel, so a patch
that shows a thing writes its channels into the whole; with a mean, patches learn names several times slower (measured;
reports/log.md). `class_token`: as CLIP does, which SCG's region tokens start from.
Deviates: CLIP has a transformer for text, and no projection of two layers behind its linear one. `lit` has CLIP's
blocks (with text.layers above 0) and nothing behind; `scratch` has those two layers, and its blocks have GELU and eps
1e-6 where CLIP's have QuickGELU and 1e-5.

Axes: batch, height/width (pixels), tokens (patches, row-major), grid_h/grid_w, length (text tokens), dim, texts.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline import params
from pipeline.encoders.files import fit_weights
from pipeline.encoders.small_vit import Count, SmallTower, TowerConfig
from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD, TextRows, VisualTower
from pipeline.nn.text import TextSizes, TextTransformer, Vocabulary
from pipeline.nn.visual_tower import value_tokens
from pipeline.params import Range
from pipeline.text.tokenizers import BytePairTokenizer

FAMILY = "trained_clip"


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipArchitecture:
    """What decides the shape and the function of a small CLIP.

    Attributes:
        tower: "scratch" has an image tower of its own, `image`; "lit" projects the patch tokens of a frozen DINO.
        image: the tower of "scratch"; its `image_size` is the CLIP's in both cases.
        text: the text tower; that of "lit" is built as CLIP's. Source: SCG's appendix (card scg.md section 6).
        embed_dim: width of the space that both share.
        projection: of image tokens: "none" (the tower's space is the joint one: SCG's LiT), "linear" or "mlp".
        pooling: how an image is read; "both" trains both readings, and its vector is that of the smooth maximum.
        sharpness: of the smooth maximum over patches: near 0 it is the mean, when large the maximum.
    """

    tower: Literal["scratch", "lit"]
    image: TowerConfig
    text: TextSizes
    embed_dim: Count
    projection: Literal["none", "linear", "mlp"]
    pooling: Literal["smooth_maximum", "class_token", "both"]
    sharpness: Annotated[float, Range(0, low_open=True)]


def smooth_maximum(x: Float[Tensor, "batch tokens dim"], sharpness: float) -> Float[Tensor, "batch dim"]:
    """log(mean(exp(sharpness * x))) / sharpness over the tokens: between their mean and their maximum."""
    return (torch.logsumexp(sharpness * x.float(), dim=1) - math.log(x.shape[1])) / sharpness


class FrozenTower(nn.Module):
    """The frozen DINO's tokens; never in training mode, never with gradients."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        if (encoder.mean, encoder.std) != (IMAGENET_MEAN, IMAGENET_STD):
            raise ValueError(f"LiT needs a tower with ImageNet's mean and std, not {encoder.mean} and {encoder.std}")
        self.encoder: Any = encoder.eval().requires_grad_(False)
        self.patch_size, self.embed_dim, self.prefix = encoder.patch_size, encoder.embed_dim, encoder.prefix

    def train(self, mode: bool = True) -> "FrozenTower":
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def all_tokens(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch length dim"]:
        """Tokens after the final norm, the prefix first."""
        return self.encoder.all_tokens(pixels)


class SmallClip(nn.Module):
    """Both towers; a ClipEncoder. `scale` is what cosines were multiplied with at the end of training."""

    scale: Tensor

    def __init__(self, config: ClipArchitecture, vocabulary: Vocabulary, frozen: nn.Module | None) -> None:
        """`frozen`: the DINO of "lit", None for "scratch"."""
        super().__init__()
        lit = config.tower == "lit"
        if (frozen is None) == lit:
            raise ValueError(f"tower {config.tower!r} {'needs a' if frozen is None else 'takes no'} frozen encoder")
        self.image_size, self.embed_dim = config.image.image_size, config.embed_dim
        self.mean, self.std = IMAGENET_MEAN, IMAGENET_STD
        self.pooling, self.sharpness = config.pooling, config.sharpness
        self.tokenizer = BytePairTokenizer(config.text.context_length)
        tower: Any = config.image.build() if frozen is None else FrozenTower(frozen)
        if config.pooling != "smooth_maximum" and tower.prefix != 1:
            raise ValueError(f"pooling {config.pooling!r} needs an image tower with one class token")
        self.tower, self.patch_size = tower, tower.patch_size
        self.image_head = _projection(tower.embed_dim, config.embed_dim, config.projection)
        self.text = TextTransformer(
            config.text,
            vocab_size=self.tokenizer.vocab_size,
            end_token=self.tokenizer.eot,
            out_dim=config.embed_dim,
            vocabulary=vocabulary,
            block="clip" if lit else "timm",
        )
        self.text_head = _projection(config.embed_dim, config.embed_dim, "none" if lit else "mlp")
        self.register_buffer("scale", torch.tensor(1.0))

    @property
    def logit_scale(self) -> float:
        """The scale as a number."""
        return float(self.scale)

    def readings(self, pixels: Float[Tensor, "batch 3 height width"]) -> dict[str, Float[Tensor, "batch dim"]]:
        """Unit vector of the image by every way in which `pooling` reads it; the first is `encode_image`'s."""
        tokens = self.image_head(self.tower.all_tokens(pixels)).float()
        found = {}
        if self.pooling != "class_token":
            found["smooth_maximum"] = F.normalize(
                smooth_maximum(tokens[:, self.tower.prefix :], self.sharpness), dim=-1
            )
        if self.pooling != "smooth_maximum":
            found["class_token"] = F.normalize(tokens[:, 0], dim=-1)
        return found

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit vector of the image."""
        return next(iter(self.readings(pixels).values()))

    def encode_patches(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch grid_h grid_w dim"]:
        """Unit vector of every patch, in the space of the texts.

        Patches that were trained against texts are projected as they are; where only the class token was, as MaskCLIP
        does (`value_tokens`).
        """
        height, width = (side // self.patch_size for side in pixels.shape[-2:])
        if self.pooling == "class_token":
            patches, _ = value_tokens(self.visual_tower(), pixels)
        else:
            patches = self.image_head(self.tower.all_tokens(pixels)[:, self.tower.prefix :])
        return F.normalize(patches.float(), dim=-1).unflatten(1, (height, width))

    def visual_tower(self) -> VisualTower:
        """The image tower taken apart.

        Raises:
            ValueError: its class token was not trained.
        """
        if self.pooling == "smooth_maximum":
            raise ValueError("this CLIP trained no class token: set encoders.clip.train.architecture.pooling to both")
        if isinstance(self.tower, FrozenTower):
            return self.tower.encoder.visual_tower(self.image_head)
        return SmallTower(self.tower, self.image_head)

    def encode_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """Unit vector of every text."""
        return self.embed_ids(self.tokenizer(texts).to(self.scale.device))

    def embed_ids(self, texts: Int64[Tensor, "texts length"] | TextRows) -> Float[Tensor, "texts dim"]:
        """Unit vector of every tokenised text."""
        return F.normalize(self.text_head(self.text(texts)).float(), dim=-1)


def _projection(inputs: int, outputs: int, kind: str) -> nn.Module:
    """Nothing, Linear, or Linear-GELU-Linear. Raises ValueError where nothing would change the width."""
    if kind == "none":
        if inputs != outputs:
            raise ValueError(f"projection none: the tower's width {inputs} is not the joint space's {outputs}")
        return nn.Identity()
    if kind == "linear":
        return nn.Sequential(nn.Linear(inputs, outputs, bias=False))
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


def load(state: Mapping[str, Tensor], config: Mapping[str, Any], folder: Path, frozen: nn.Module | None) -> SmallClip:
    """The encoder of a model folder; `frozen` has the architecture of its LiT tower (any weights)."""
    settings = params.build(ClipArchitecture, config["architecture"], f"{folder}: architecture")
    model = SmallClip(settings, Vocabulary(state["text.vocabulary.rows"]), frozen)
    fit_weights(model, state, folder)
    return model
