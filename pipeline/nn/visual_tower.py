"""An image transformer taken apart: tokens, layers and the way into the joint space, for methods that add tokens to it.

Towers of three styles look alike here (CLIP's with `ln_pre` and a projection, DINO's without, the small trained ones):
`encoders` wrap each of them as an `interfaces.VisualTower`.

Axes: batch, height/width (pixels), length (class token, then patches row-major), tokens (patches only), width (of the
tower), dim (of the joint space), heads. Masks are additive float: 0 keeps, -inf drops.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD, Layer, Projected, Triple, VisualTower


def whole_patches(pixels: Float[Tensor, "batch 3 height width"], patch_size: int) -> tuple[int, int]:
    """Rows and columns of the patch grid.

    Raises:
        ValueError: the sides are no multiples of the patch.
    """
    height, width = pixels.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"an image of {height}x{width} is not a whole number of {patch_size}-pixel patches")
    return height // patch_size, width // patch_size


def heads_apart(x: Float[Tensor, "batch length inner"], heads: int) -> Float[Tensor, "batch heads length part"]:
    """The concatenated heads as an axis."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def attend(projected: Projected, heads: int, mask: Tensor | None) -> Float[Tensor, "batch length inner"]:
    """Softmax attention of concatenated heads; `mask` broadcasts to [batch, heads, length, length].

    Raises:
        TypeError: a boolean mask, which some kernels add to the logits as 0 and 1.
    """
    if mask is not None and not mask.dtype.is_floating_point:
        raise TypeError(f"an attention mask must be additive float, not {mask.dtype}")
    query, key, value = (heads_apart(x, heads) for x in projected)
    mixed = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return mixed.transpose(1, 2).flatten(2)


def step(
    layer: Layer, x: Float[Tensor, "batch length inner"], mask: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "batch length inner"]:
    """The tokens through one layer."""
    return layer.finish(x, attend(layer.qkv(x), layer.heads, mask))


def run(
    tower: VisualTower, x: Float[Tensor, "batch length inner"], mask: Float[Tensor, "..."] | None = None
) -> Float[Tensor, "batch length inner"]:
    """The tokens through every layer."""
    for layer in tower.layers:
        x = step(layer, x, mask)
    return x


def value_tokens(
    tower: VisualTower, pixels: Float[Tensor, "batch 3 height width"]
) -> tuple[Float[Tensor, "batch tokens dim"], Float[Tensor, "batch tokens inner"]]:
    """Patches in the joint space when each attends to nothing but itself in the last layer, and that layer's keys.

    Not normalised. Source: MaskCLIP (Zhou et al. 2022) 3.2 and its release (residual and MLP kept).
    """
    x = tower.embed(pixels)
    for layer in tower.layers[:-1]:
        x = step(layer, x)
    last = tower.layers[-1]
    _, keys, values = last.qkv(x)
    return tower.project(last.finish(x, values))[:, 1:], keys[:, 1:]


def renormalised(pixels: Float[Tensor, "batch 3 height width"], mean: Triple, std: Triple) -> Float[Tensor, "..."]:
    """ImageNet-normalised pixels as a tower with that mean and std takes them."""
    column = [torch.tensor(v, device=pixels.device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD, mean, std)]
    return (pixels * column[1] + column[0] - column[2]) / column[3]
