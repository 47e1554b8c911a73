"""A vision transformer that sees a few of an image's patches, and a decoder that paints the others.

In training every sample hides a random share of its patches: the encoder reads the rest behind a class token, and the
decoder gets a learned mask token in every hidden place. In eval mode nothing is hidden and the order is the image's.
Positions are fixed 2-D sine codes in both; the class token's row is zero.

Source: MAE (arXiv 2111.06377) and its release, which ZeroSeg builds on (card zeroseg.md, sections 2.1 and 2.2); names
of parameters follow the release.
Deviates: with a convolutional stem (`widths`), which the small configs have, patches are hidden behind the stem, whose
3x3 convolutions let pixels of hidden patches reach the borders of their visible neighbours. Without `widths` the stem
is the release's patch convolution and nothing leaks.

Axes: batch, tokens (all patches, row by row), visible (patches that are shown, in drawn order), values (the pixels of a
patch: rows, columns, channels), dim.
"""

from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from pipeline.nn.attention import INIT_STD, Block
from pipeline.nn.vit import ConvStem, resize_position, sine_code
from pipeline.params import ParamsError, Range

Count = Annotated[int, Range(1)]
# Source: MAE's release (`norm_layer`, and the guard of a normalised patch's variance).
NORM_EPS, VARIANCE_EPS = 1e-6, 1e-6


@dataclass(frozen=True, kw_only=True, slots=True)
class EncoderConfig:
    """The encoder.

    Attributes:
        image_size: side of the training input, pixels.
        first_stride: patch size where there are no `widths`, else that of the first convolution, pixels.
        widths: channels of a residual convolutional stem, halving the grid with each further one; none in the paper.
        mask_ratio: share of the patches that training hides.
    """

    image_size: Count
    first_stride: Count
    widths: tuple[Count, ...]
    dim: Count
    layers: Count
    heads: Count
    mask_ratio: Annotated[float, Range(0, 0.99)]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """The decoder's width, blocks and heads."""

    dim: Count
    layers: Count
    heads: Count


class Masking(NamedTuple):
    """Which patches a sample shows.

    kept: their places, in drawn order; restore: where each patch stands among the visible ones followed by the hidden
    ones; hidden: True where a patch is not shown.
    """

    kept: Int64[Tensor, "batch visible"]
    restore: Int64[Tensor, "batch tokens"]
    hidden: Bool[Tensor, "batch tokens"]


class Encoded(NamedTuple):
    """tokens: the visible patches after the last norm; cls: the class token; grid: rows and columns of all patches."""

    tokens: Float[Tensor, "batch visible dim"]
    cls: Float[Tensor, "batch dim"]
    masking: Masking
    grid: tuple[int, int]


def draw_masking(batch: int, tokens: int, ratio: float, device: torch.device) -> Masking:
    """A random choice for each sample: the int(tokens * (1 - ratio)) patches (one at least) of the lowest noise."""
    order = torch.rand(batch, tokens, device=device).argsort(dim=1)
    return _masking(order, max(1, int(tokens * (1 - ratio))))


def show_all(batch: int, tokens: int, device: torch.device) -> Masking:
    """Every patch in its place."""
    return _masking(torch.arange(tokens, device=device).expand(batch, tokens), tokens)


def _masking(order: Int64[Tensor, "batch tokens"], count: int) -> Masking:
    restore = order.argsort(dim=1)
    return Masking(order[:, :count], restore, restore >= count)


def unshuffle(
    visible: Float[Tensor, "batch visible dim"],
    mask_token: Float[Tensor, "1 1 dim"],
    restore: Int64[Tensor, "batch tokens"],
) -> Float[Tensor, "batch tokens dim"]:
    """All patches in their places, the mask token in those of the hidden ones."""
    hidden = mask_token.to(visible.dtype).expand(len(visible), restore.shape[1] - visible.shape[1], -1)
    joined = torch.cat([visible, hidden], dim=1)
    return joined.gather(1, restore[:, :, None].expand(-1, -1, joined.shape[2]))


def fixed_positions(rows: int, columns: int, dim: int) -> Float[Tensor, "1 _ {dim}"]:
    """[1, 1 + rows * columns, dim]: zero for the class token, then the sine code, the column's half first.

    Source: MAE's release (`get_2d_sincos_pos_embed`, where "w goes first").
    """
    by_row, by_column = sine_code(rows, columns, dim).chunk(2, dim=1)
    code = torch.cat([by_column, by_row], dim=1).flatten(2).transpose(1, 2)
    return torch.cat([torch.zeros(1, 1, dim), code], dim=1)


def resize_positions(
    positions: Float[Tensor, "1 _ dim"], trained: tuple[int, int], grid: tuple[int, int]
) -> Float[Tensor, "1 _ dim"]:
    """Positions of another grid, bicubic; the class token's row stays apart."""
    if grid == trained:
        return positions
    code = positions[:, 1:].transpose(1, 2).unflatten(2, trained)
    return torch.cat([positions[:, :1], resize_position(code, *grid, antialias=False).flatten(2).transpose(1, 2)], 1)


def patchify(pixels: Float[Tensor, "batch 3 height width"], patch: int) -> Float[Tensor, "batch tokens values"]:
    """The pixels of every patch; sides are multiples of `patch`. Source: MAE's release (channels last in a patch)."""
    rows, columns = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    cells = pixels.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def normalise_patches(patches: Float[Tensor, "batch tokens values"]) -> Float[Tensor, "batch tokens values"]:
    """Every patch with mean 0 and (unbiased) variance 1. Source: MAE's release, `norm_pix_loss`."""
    mean, variance = patches.mean(dim=2, keepdim=True), patches.var(dim=2, keepdim=True)
    return (patches - mean) / (variance + VARIANCE_EPS).sqrt()


class MaskedAutoencoder(nn.Module):
    """Encoder and decoder.

    Raises:
        ParamsError: the image is not a whole number of patches.
    """

    def __init__(self, encoder: EncoderConfig, decoder: DecoderConfig) -> None:
        super().__init__()
        self.mask_ratio = encoder.mask_ratio
        self.stem = ConvStem(first_stride=encoder.first_stride, widths=encoder.widths, dim=encoder.dim)
        self.patch_size = self.stem.patch_size
        side = encoder.image_size // self.patch_size
        if side * self.patch_size != encoder.image_size:
            raise ParamsError(
                f"encoder.image_size: {encoder.image_size} is no whole number of {self.patch_size}-pixel patches"
            )
        self.trained_grid = (side, side)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, encoder.dim))
        self.pos_embed: Tensor
        self.register_buffer("pos_embed", fixed_positions(side, side, encoder.dim))
        self.blocks = nn.ModuleList(Block(encoder.dim, encoder.heads, 4.0, eps=NORM_EPS) for _ in range(encoder.layers))
        self.norm = nn.LayerNorm(encoder.dim, eps=NORM_EPS)

        self.decoder_embed = nn.Linear(encoder.dim, decoder.dim)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder.dim))
        self.decoder_pos_embed: Tensor
        self.register_buffer("decoder_pos_embed", fixed_positions(side, side, decoder.dim))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder.dim, decoder.heads, 4.0, eps=NORM_EPS) for _ in range(decoder.layers)
        )
        self.decoder_norm = nn.LayerNorm(decoder.dim, eps=NORM_EPS)
        self.decoder_pred = nn.Linear(decoder.dim, 3 * self.patch_size**2)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier for linear layers and a plain patch convolution, normal tokens. Source: MAE's release."""
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        if isinstance(self.stem.layers, nn.Conv2d):
            nn.init.xavier_uniform_(self.stem.layers.weight.data.flatten(1))
        nn.init.normal_(self.cls_token, std=INIT_STD)
        nn.init.normal_(self.mask_token, std=INIT_STD)

    def encode(self, pixels: Float[Tensor, "batch 3 height width"]) -> Encoded:
        """Visible patches; all of them in eval mode."""
        x = self.stem(pixels.contiguous(memory_format=torch.channels_last))
        rows, columns = x.shape[-2:]
        position = resize_positions(self.pos_embed, self.trained_grid, (rows, columns))
        x = x.flatten(2).transpose(1, 2) + position[:, 1:]
        batch, tokens, dim = x.shape
        if self.training:
            masking = draw_masking(batch, tokens, self.mask_ratio, x.device)
        else:
            masking = show_all(batch, tokens, x.device)
        x = x.gather(1, masking.kept[:, :, None].expand(-1, -1, dim))
        x = torch.cat([(self.cls_token + position[:, :1]).to(x.dtype).expand(batch, -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return Encoded(x[:, 1:], x[:, 0], masking, (rows, columns))

    def decode(self, encoded: Encoded) -> Float[Tensor, "batch tokens inner"]:
        """Every patch in its place, after the decoder's last norm; the class token takes part and is dropped."""
        x = self.decoder_embed(torch.cat([encoded.cls[:, None], encoded.tokens], dim=1))
        places = unshuffle(x[:, 1:], self.mask_token, encoded.masking.restore)
        x = torch.cat([x[:, :1], places], dim=1)
        x = x + resize_positions(self.decoder_pos_embed, self.trained_grid, encoded.grid)
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)[:, 1:]

    def predict(self, decoded: Float[Tensor, "batch tokens inner"]) -> Float[Tensor, "batch tokens values"]:
        """The pixels of every patch, in the order of `patchify`."""
        return self.decoder_pred(decoded)
