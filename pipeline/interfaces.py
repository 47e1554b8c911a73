"""What the layers hand to each other: the frozen towers and the training batch.

Axes: batch, height/width in pixels, grid_h/grid_w in patches (height // patch_size, width // patch_size),
tokens = grid_h * grid_w row-major, length (class token, then the patches), width (of a tower), dim (of the joint
space of images and texts, or of a tower's output), texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

Facet = Literal["tokens", "keys"]
T = TypeVar("T")
# Queries, keys and values, heads concatenated.
Projected = tuple[
    Float[Tensor, "batch length inner"], Float[Tensor, "batch length inner"], Float[Tensor, "batch length inner"]
]
Triple = tuple[float, float, float]

# Source: DINO and timm (`IMAGENET_DEFAULT_MEAN/STD`), RGB in [0, 1]. What every TrainBatch is normalised with.
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
# Region label of a pixel that lies outside the stored image (a crop that reaches past its border).
OUTSIDE = 255


@runtime_checkable
class PatchEncoder(Protocol):
    """A frozen self-supervised ViT; an `nn.Module` in eval mode without gradients."""

    patch_size: int
    embed_dim: int
    mean: Triple
    std: Triple

    def to(self, device: str) -> "PatchEncoder": ...

    def patch_tokens(
        self, pixels: Float[Tensor, "batch 3 height width"], facet: Facet
    ) -> Float[Tensor, "batch tokens dim"]:
        """One vector per patch from the last block, CLS dropped, row-major.

        `pixels` are normalised with `mean` and `std`; sides are multiples of `patch_size` (else ValueError).
        "tokens": after the final LayerNorm. "keys": the last block's attention keys, heads concatenated.
        """
        ...


@runtime_checkable
class Layer(Protocol):
    """A pre-norm block in two halves: what it attends with, and what follows the attention."""

    heads: int

    def qkv(self, x: Float[Tensor, "batch length inner"]) -> Projected:
        """Queries, keys and values of the normed tokens, heads concatenated."""
        ...

    def attended(self, mixed: Float[Tensor, "batch length inner"]) -> Float[Tensor, "batch length inner"]:
        """What the attention adds to the tokens for what it mixed: the out-projection."""
        ...

    def finish(
        self, x: Float[Tensor, "batch length inner"], mixed: Float[Tensor, "batch length inner"]
    ) -> Float[Tensor, "batch length inner"]:
        """The block's output for what the attention mixed: out-projection, both residuals, MLP."""
        ...


@runtime_checkable
class VisualTower(Protocol):
    """A ViT with a class token.

    Attributes:
        patch_size: pixels.
        class_start: the class token as it enters the first layer.
    """

    patch_size: int

    @property
    def layers(self) -> Sequence[Layer]: ...

    @property
    def class_start(self) -> Float[Tensor, " inner"]: ...

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch length inner"]:
        """Tokens as they enter the first layer, for any size of whole patches (else ValueError)."""
        ...

    def project(self, x: Float[Tensor, "batch length inner"]) -> Float[Tensor, "batch length dim"]:
        """Final norm and projection of tokens that have left the last layer; not normalised to unit length."""
        ...


@runtime_checkable
class ClipEncoder(Protocol):
    """A frozen image and text tower; an `nn.Module` in eval mode without gradients. All outputs are unit vectors."""

    image_size: int
    patch_size: int
    embed_dim: int
    mean: Triple
    std: Triple
    logit_scale: float

    def to(self, device: str) -> "ClipEncoder": ...

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]: ...

    def encode_patches(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, "batch grid_h grid_w dim"]: ...

    def encode_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]: ...

    def visual_tower(self) -> VisualTower:
        """The image tower taken apart. Raises ValueError when it has no class token trained against texts."""
        ...


@dataclass(frozen=True)
class TextRows:
    """Texts side by side in rows, so that a text tower computes next to no padding.

    token_ids: 0 between the last text of a row and its end. places: of each token in its text; 0 in padding, so that
    each padding token is a text of its own. ends: where each text's last token is in the flattened rows, in the order
    of the texts.
    """

    token_ids: Int64[Tensor, "rows length"]
    places: Int64[Tensor, "rows length"]
    ends: Int64[Tensor, " texts"]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "TextRows":
        """The same rows on `device`."""
        return TextRows(*(getattr(self, field.name).to(device, non_blocking=non_blocking) for field in fields(self)))


@dataclass
class TrainBatch:
    """Pairs after the joint transforms; row i of every field is the same sample.

    pixels: ImageNet-normalised RGB. captions: the caption (or prompt) chosen for this visit. token_ids: its tokens,
    padded with 0. regions: pseudo-mask labels moved with the image, at the pseudo-mask grid; OUTSIDE where the crop
    leaves the stored image; None where the method reads none. uids: stable sample names. prompt_ids: tokens of the k-th
    noun prompt of image i at [k, i]. views: unit CLIP vectors of the image's cached views. rows: captions, and after
    them the first prompt of each image, the second and so on, side by side; None for towers that need each alone.
    """

    pixels: Float[Tensor, "batch 3 height width"]
    captions: list[str]
    token_ids: Int64[Tensor, "batch length"]
    regions: UInt8[Tensor, "batch grid_h grid_w"] | None
    uids: list[str]
    prompt_ids: Int64[Tensor, "prompts batch length"] | None = None
    views: Float[Tensor, "batch views dim"] | None = None
    rows: TextRows | None = None

    @property
    def texts(self) -> "Int64[Tensor, 'texts length'] | TextRows":
        """What a text tower reads: captions, and after them the first prompt of each image, the second and so on."""
        if self.rows is not None:
            return self.rows
        return self.token_ids if self.prompt_ids is None else torch.cat([self.token_ids, *self.prompt_ids])

    def to(self, device: torch.device | str) -> "TrainBatch":
        """The same batch on `device`."""
        return on_device(self, device)


def on_device(batch: T, device: torch.device | str) -> T:
    """A dataclass of tensors and other things with its tensors on `device`."""
    return replace(batch, **{f.name: moved(getattr(batch, f.name), device) for f in fields(batch)})  # type: ignore[arg-type, type-var]


def moved(value: Any, device: torch.device | str) -> Any:
    """A batch's field: on `device` if it is of tensors, else as it is."""
    return value.to(device, non_blocking=True) if isinstance(value, Tensor | TextRows) else value
