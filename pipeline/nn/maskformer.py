"""MaskFormer's parts without the classifier: pixel decoder, transformer decoder and mask head.

Axes: batch, layers (of the transformer decoder), queries, dim (width), height/width and tokens (of the coarsest map),
rows/columns (of the finest map, where masks live), heads.
Source: MaskFormer sections 3.2-3.4 and its release (card sseg section 3); S-Seg 3.2.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.nn.attention import in_one_kernel

# Source: DETR's and MaskFormer's sine code: temperature, and positions normalised to 2 pi.
SINE_TEMPERATURE, SINE_SCALE = 10_000.0, 2 * math.pi
# Source: MaskFormer release (GroupNorm 32); a narrower decoder has groups of at least four channels.
NORM_GROUPS = 32


class Masks(NamedTuple):
    """What the decoder predicts, per layer: `features` after the shared LayerNorm and `logits` of binary masks."""

    features: Float[Tensor, "layers batch queries dim"]
    logits: Float[Tensor, "layers batch queries rows columns"]


def group_norm(channels: int) -> nn.GroupNorm:
    """MaskFormer's normalisation for `channels`."""
    return nn.GroupNorm(math.gcd(min(NORM_GROUPS, max(channels // 4, 1)), channels), channels)


def _fill(convolution: nn.Conv2d) -> None:
    # Source: MaskFormer release (`c2_xavier_fill`).
    nn.init.kaiming_uniform_(convolution.weight, a=1)
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)


class FusionLayer(nn.Module):
    """One step down the pyramid: lateral 1x1 (norm, no ReLU) plus the nearest-upsampled map above, then 3x3."""

    def __init__(self, lateral: int, dim: int) -> None:
        super().__init__()
        self.lateral = nn.Sequential(nn.Conv2d(lateral, dim, 1, bias=False), group_norm(dim))
        self.smooth = _smooth(dim, dim)

    def forward(
        self, above: Float[Tensor, "batch dim _ _"], beside: Float[Tensor, "batch _ rows columns"]
    ) -> Float[Tensor, "batch dim rows columns"]:
        """The map at the lateral's resolution."""
        return self.smooth(F.interpolate(above, size=beside.shape[-2:], mode="nearest") + self.lateral(beside))


def _smooth(inside: int, dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, dim, 3, padding=1, bias=False), group_norm(dim), nn.ReLU())


class PixelDecoder(nn.Module):
    """Feature pyramid network: backbone maps to one embedding per pixel of the finest map. `channels`: finest first."""

    def __init__(self, channels: Sequence[int], *, dim: int, mask_dim: int) -> None:
        super().__init__()
        self.top = _smooth(channels[-1], dim)
        self.layers = nn.ModuleList(FusionLayer(lateral, dim) for lateral in reversed(channels[:-1]))
        self.mask_features = nn.Conv2d(dim, mask_dim, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                _fill(module)

    def forward(self, maps: Sequence[Float[Tensor, "batch _ _ _"]]) -> Float[Tensor, "batch mask_dim rows columns"]:
        """Per-pixel embeddings."""
        x = self.top(maps[-1])
        for layer, beside in zip(self.layers, reversed(maps[:-1]), strict=True):
            x = layer(x, beside)
        return self.mask_features(x)


class QueryAttention(nn.Module):
    """Multi-head attention with separate inputs for queries, keys and values, which have different positions added."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"width {dim} is not a multiple of {heads} heads")
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))

    def forward(
        self,
        query: Float[Tensor, "batch queries dim"],
        key: Float[Tensor, "batch tokens dim"],
        value: Float[Tensor, "batch tokens dim"],
    ) -> Float[Tensor, "batch queries dim"]:
        """Each query's mixture of the values."""
        q, k, v = (self._split(x) for x in (self.query(query), self.key(key), self.value(value)))
        if in_one_kernel(q):
            chance = self.dropout.p if self.training else 0.0
            mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=chance)
        else:
            mixed = self.dropout(((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1).to(v.dtype)) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _split(self, x: Float[Tensor, "batch n dim"]) -> Float[Tensor, "batch heads n per_head"]:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class DecoderLayer(nn.Module):
    """DETR's post-norm layer: self-attention, cross-attention, feed-forward, each added and then normalised."""

    def __init__(self, *, dim: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = QueryAttention(dim, heads, dropout)
        self.cross_attention = QueryAttention(dim, heads, dropout)
        self.feed_forward = nn.Sequential(
            nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, dim)
        )
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch queries dim"],
        query_position: Float[Tensor, "queries dim"],
        memory: Float[Tensor, "batch tokens dim"],
        key: Float[Tensor, "batch tokens dim"],
    ) -> Float[Tensor, "batch queries dim"]:
        """`key` is `memory` with its positions added. Query positions enter queries and keys, never values."""
        placed = x + query_position
        x = self.norm1(x + self.dropout(self.self_attention(placed, placed, x)))
        x = self.norm2(x + self.dropout(self.cross_attention(x + query_position, key, memory)))
        return self.norm3(x + self.dropout(self.feed_forward(x)))


class TransformerDecoder(nn.Module):
    """Learned queries that attend to the coarsest map: zeros at the start, the learned vectors as their positions.

    No encoder layers; one LayerNorm shared by every layer's output. Source: MaskFormer release.
    Deviates: DETR starts attention biases at zero, and the first LayerNorm then sees an all-zero vector, where its
    gradient is 300 times too large for a clipped norm; ours keep nn.Linear's random start.
    """

    def __init__(
        self, channels: int, *, dim: int, queries: int, layers: int, heads: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, dim, 1) if channels != dim else nn.Identity()
        if isinstance(self.project, nn.Conv2d):
            _fill(self.project)
        self.query_position = nn.Parameter(torch.randn(queries, dim))
        self.layers = nn.ModuleList(
            DecoderLayer(dim=dim, heads=heads, hidden=hidden, dropout=dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(dim)
        for name, parameter in self.layers.named_parameters():
            if parameter.ndim > 1:
                # Fans of dim and 3 dim halve the variance: the release packs these three into one matrix.
                packed = name.endswith(("query.weight", "key.weight", "value.weight"))
                nn.init.xavier_uniform_(parameter, gain=0.5**0.5 if packed else 1.0)

    def forward(
        self, coarse: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "layers batch queries dim"]:
        """Query features after each layer."""
        memory = self.project(coarse)
        position = sine_position(memory.shape[2], memory.shape[3], memory.shape[1], memory.device)
        memory = memory.flatten(2).transpose(1, 2)
        key = memory + position.to(memory.dtype)
        x = self.query_position.new_zeros(len(memory), *self.query_position.shape)
        features = []
        for layer in self.layers:
            x = layer(x, self.query_position, memory, key)
            features.append(self.norm(x))
        return torch.stack(features)


def sine_position(height: int, width: int, dim: int, device: torch.device) -> Float[Tensor, "tokens {dim}"]:
    """DETR's 2-D sine code, row-major: first half the row, second half the column, sine and cosine interleaved."""
    half = dim // 2
    frequency = SINE_TEMPERATURE ** -(2 * torch.div(torch.arange(half, device=device), 2, rounding_mode="floor") / half)

    def code(length: int) -> Tensor:
        place = torch.arange(1, length + 1, device=device, dtype=torch.float32) / (length + 1e-6) * SINE_SCALE
        angles = place[:, None] * frequency
        return torch.stack([angles[:, 0::2].sin(), angles[:, 1::2].cos()], dim=2).flatten(1)

    rows, columns = code(height)[:, None], code(width)[None]
    return torch.cat([rows.expand(-1, width, -1), columns.expand(height, -1, -1)], dim=2).flatten(0, 1)


class MaskFormer(nn.Module):
    """Image to query features and binary masks, class-agnostic. `backbone` is one of `pipeline.nn.pyramid`."""

    def __init__(
        self,
        backbone: nn.Module,
        *,
        pixel_dim: int,
        mask_dim: int,
        dim: int,
        queries: int,
        layers: int,
        heads: int,
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = PixelDecoder(backbone.channels, dim=pixel_dim, mask_dim=mask_dim)  # type: ignore[arg-type]
        self.decoder = TransformerDecoder(
            backbone.channels[-1],  # type: ignore[index]
            dim=dim,
            queries=queries,
            layers=layers,
            heads=heads,
            hidden=hidden,
            dropout=dropout,
        )
        self.mask_embedding = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, mask_dim)
        )

    def forward(self, pixels: Float[Tensor, "batch 3 height width"], *, all_layers: bool) -> Masks:
        """Features and mask logits of every decoder layer, or of the last one only."""
        maps = self.backbone(pixels)
        embeddings = self.pixel_decoder(maps)
        features = self.decoder(maps[-1])
        if not all_layers:
            features = features[-1:]
        logits = self.mask_embedding(features) @ embeddings.flatten(2)
        return Masks(features, logits.unflatten(3, embeddings.shape[-2:]))
