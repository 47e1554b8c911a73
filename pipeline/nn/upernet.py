"""UPerNet's head: pyramid pooling on the coarsest map, a feature pyramid above it, all maps fused, a 1x1 classifier.

Axes: batch, height/width (cells of a map), classes; maps are finest first, with their own channels and sizes.

Source: Xiao et al. 2018 (arXiv 1807.10221), Fig. 4; equal to transformers' `UperNetHead` on the same weights.
Deviates: the releases add an auxiliary head of convolutions (loss weight 0.4), which the paper does not have.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

Map = Float[Tensor, "batch _ _ _"]


def conv_norm(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Convolution that keeps the size, batch norm, ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU())


def resize(x: Map, size: Sequence[int]) -> Map:
    """Bilinear, pixel centres aligned."""
    return F.interpolate(x, tuple(size), mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """The map beside its averages over grids of `scales` x `scales`, mixed to `dim` channels. Source: PSPNet 3.2."""

    def __init__(self, channels: int, dim: int, scales: Sequence[int]) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.branches = nn.ModuleList(conv_norm(channels, dim, 1) for _ in scales)
        self.mix = conv_norm(channels + len(scales) * dim, dim, 3)

    def forward(self, x: Map) -> Map:
        """Same height and width."""
        pooled = [branch(F.adaptive_avg_pool2d(x, s)) for branch, s in zip(self.branches, self.scales, strict=True)]
        return self.mix(torch.cat([x, *(resize(p, x.shape[2:]) for p in pooled)], dim=1))


class UPerNetHead(nn.Module):
    """Class logits at the resolution of the finest map."""

    def __init__(self, channels: Sequence[int], *, dim: int, pool_scales: Sequence[int], num_classes: int) -> None:
        super().__init__()
        self.pooling = PyramidPooling(channels[-1], dim, pool_scales)
        self.laterals = nn.ModuleList(conv_norm(width, dim, 1) for width in channels[:-1])
        self.smooth = nn.ModuleList(conv_norm(dim, dim, 3) for _ in channels[:-1])
        self.fuse = conv_norm(len(channels) * dim, dim, 3)
        self.classifier = nn.Conv2d(dim, num_classes, 1)

    def forward(self, maps: Sequence[Map]) -> Float[Tensor, "batch classes height width"]:
        """Logits from one map per level, finest first."""
        levels = [self.pooling(maps[-1])]
        for lateral, x in zip(reversed(self.laterals), reversed(maps[:-1]), strict=True):
            levels.insert(0, lateral(x) + resize(levels[0], x.shape[2:]))
        smoothed = [smooth(x) for smooth, x in zip(self.smooth, levels[:-1], strict=True)]
        size = levels[0].shape[2:]
        return self.classifier(self.fuse(torch.cat([resize(x, size) for x in (*smoothed, levels[-1])], dim=1)))


class PlainPyramid(nn.Module):
    """A timm ViT whose tokens after four of its blocks become maps of 1/4, 1/2, 1 and 2 patches a cell.

    Source: BEiT's segmentation, which MAE's appendix A.3 follows: two transposed convolutions, one, none, a max pool.
    """

    def __init__(self, name: str, *, taps: Sequence[int], pretrained: bool) -> None:
        """`taps`: blocks to read, counted from 0; MAE's ViT-B: 3, 5, 7, 11.

        Raises:
            ValueError: not four taps. RuntimeError from timm when `name` is unknown or its weights cannot be fetched.
        """
        super().__init__()
        if len(taps) != 4:
            raise ValueError(f"a plain ViT gives four maps, from four blocks; found taps {list(taps)}")
        import timm

        self.body: Any = timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
        self.taps = self.body.prune_intermediate_layers(list(taps), prune_norm=True)
        dim, patch = self.body.embed_dim, self.body.patch_embed.patch_size[0]
        self.channels, self.strides = (dim,) * 4, (patch // 4, patch // 2, patch, 2 * patch)
        finest = [
            nn.ConvTranspose2d(dim, dim, 2, 2),
            nn.BatchNorm2d(dim),
            nn.GELU(),
            nn.ConvTranspose2d(dim, dim, 2, 2),
        ]
        self.rescale = nn.ModuleList(
            [nn.Sequential(*finest), nn.ConvTranspose2d(dim, dim, 2, 2), nn.Identity(), nn.MaxPool2d(2)]
        )

    def forward(self, pixels: Float[Tensor, "batch 3 height width"]) -> list[Map]:
        """Four maps, finest first; sides are multiples of two patches."""
        maps = self.body.forward_intermediates(pixels, indices=self.taps, norm=False, intermediates_only=True)
        return [rescale(x) for rescale, x in zip(self.rescale, maps, strict=True)]
