"""A small vision transformer with a convolutional or a plain patch stem, for towers that must learn in minutes.

Axes: batch, height/width (pixels), grid_h/grid_w (patches), tokens = grid_h * grid_w row-major, length (tokens with the
class token before them, where there is one), dim.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.nn.attention import INIT_STD, Block, initialise
from pipeline.nn.visual_tower import whole_patches

# Source: MAE and MoCo v3 (2-D sine code).
SINE_TEMPERATURE = 10_000.0


class ResidualConv(nn.Module):
    """x + conv(relu(conv(relu(norm(x))))), 3x3, one normalisation group."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Float[Tensor, "batch dim height width"]) -> Float[Tensor, "batch dim height width"]:
        """Same shape."""
        return x + self.second(F.relu(self.first(F.relu(self.norm(x)))))


class ConvStem(nn.Module):
    """Pixels to patch vectors through residual convolutions.

    The first convolution strides by `first_stride` (its kernel as wide), each further width halves the grid, and a 1x1
    convolution ends at `dim`. Without `widths` it is the plain patch embedding.
    """

    def __init__(self, *, first_stride: int, widths: tuple[int, ...], dim: int) -> None:
        super().__init__()
        if not widths:
            self.layers = nn.Conv2d(3, dim, first_stride, stride=first_stride)
            self.patch_size = first_stride
            return
        # A kernel of 2 would see no neighbour; 3 with padding keeps the grid at height / stride.
        kernel, padding = (3, 1) if first_stride == 2 else (first_stride, 0)
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], kernel, stride=first_stride, padding=padding)]
        for width, following in zip(widths, (*widths[1:], None), strict=True):
            layers.append(ResidualConv(width))
            if following is not None:
                layers.append(nn.Conv2d(width, following, 3, stride=2, padding=1))
        layers.append(nn.Conv2d(widths[-1], dim, 1))
        self.layers = nn.Sequential(*layers)
        self.patch_size = first_stride * 2 ** (len(widths) - 1)

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim grid_h grid_w"]:
        """One vector per patch."""
        return self.layers(pixels)


def sine_code(rows: int, columns: int, dim: int) -> Float[Tensor, "1 {dim} {rows} {columns}"]:
    """Fixed 2-D sine position code: a quarter of `dim` each for sin and cos of row and column."""
    if dim % 4:
        raise ValueError(f"a 2-D sine code needs a width that is a multiple of 4, not {dim}")
    frequency = SINE_TEMPERATURE ** (-torch.arange(dim // 4) / (dim // 4))
    row = torch.arange(rows)[:, None] * frequency
    column = torch.arange(columns)[:, None] * frequency
    row = torch.cat([row.sin(), row.cos()], dim=1)[:, None].expand(rows, columns, dim // 2)
    column = torch.cat([column.sin(), column.cos()], dim=1)[None].expand(rows, columns, dim // 2)
    return torch.cat([row, column], dim=2).permute(2, 0, 1)[None].contiguous()


def resize_position(
    position: Float[Tensor, "1 dim rows columns"], rows: int, columns: int, *, antialias: bool = True
) -> Float[Tensor, "1 dim {rows} {columns}"]:
    """Position vectors at another grid, bicubic; timm and open_clip antialias, GroupViT does not."""
    if position.shape[-2:] == (rows, columns):
        return position
    return F.interpolate(position, size=(rows, columns), mode="bicubic", align_corners=False, antialias=antialias)


class VisionTransformer(nn.Module):
    """Stem + learned positions (started from a sine code) -> pre-norm blocks -> LayerNorm.

    The class token is optional: what a picture is as a whole can be pooled from its patches too, which then learn to
    localise several times faster (reports/log.md). It has no position.
    """

    def __init__(
        self,
        *,
        first_stride: int,
        widths: tuple[int, ...],
        dim: int,
        layers: int,
        heads: int,
        image_size: int,
        class_token: bool,
    ) -> None:
        super().__init__()
        self.stem = ConvStem(first_stride=first_stride, widths=widths, dim=dim)
        self.patch_size, self.embed_dim = self.stem.patch_size, dim
        grid = math.ceil(image_size / self.patch_size)
        self.position = nn.Parameter(sine_code(grid, grid, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio=4.0) for _ in range(layers))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        initialise(self.blocks)
        self.class_token = nn.Parameter(INIT_STD * torch.randn(dim)) if class_token else None

    def embed(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch length dim"]:
        """Tokens as they enter the first block: the class token, where there is one, then the patches.

        Raises:
            ValueError: the sides are no whole number of patches.
        """
        whole_patches(pixels, self.patch_size)
        x = self.stem(pixels.contiguous(memory_format=torch.channels_last))
        x = x + resize_position(self.position, x.shape[-2], x.shape[-1])
        x = x.flatten(2).transpose(1, 2)
        if self.class_token is None:
            return x
        return torch.cat([self.class_token.to(x.dtype).expand(len(x), 1, -1), x], dim=1)

    @property
    def prefix(self) -> int:
        """Tokens before the patches: 1 or 0."""
        return int(self.class_token is not None)

    def all_tokens(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch length dim"]:
        """Class token, where there is one, and patch tokens after the final LayerNorm."""
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens dim"]:
        """Patch tokens after the final LayerNorm."""
        return self.all_tokens(pixels)[:, self.prefix :]

    def keys(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch tokens dim"]:
        """The last block's attention keys, heads concatenated.

        Raises:
            ValueError: the tower has no blocks.
        """
        if not self.blocks:
            raise ValueError("keys were asked of a tower without transformer blocks; use facet tokens")
        x = self.embed(pixels)
        for block in self.blocks[:-1]:
            x = block(x)
        last: Any = self.blocks[-1]
        return last.attn.keys(last.norm1(x))[:, self.prefix :]
