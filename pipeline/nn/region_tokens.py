"""Regions read by a frozen ViT: a token per region beside the class token, in one of SCG's three masking strategies.

`context` (the paper's c): patches and class token run as always; region tokens attend to their own region's patches and
one key more. `tokens` (b): every region is a sequence of its own, patches see nothing outside it. `image` (a): every
region is an image of its own, the rest blanked. A region without a patch (or pixel) has a finite vector and is no
region; `members` says which patches each has.

Axes: batch, regions, tokens (patches, row-major), length (class token, then patches), width, dim, height/width
(pixels).

Source: SCG (arXiv 2304.01114) 3.2 and Table 3; card methods/scg.md section 3. What it leaves open follows the card: the
class token stays, region tokens read from the first layer to the last.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipeline.interfaces import Layer, VisualTower
from pipeline.nn.visual_tower import attend, heads_apart, run

# The key that a region token may always attend to: its own, or the class token's (Ding et al. 2023).
ExtraKey = Literal["self", "class_token"]


def members(regions: Int64[Tensor, "batch tokens"], count: int) -> Bool[Tensor, "batch {count} tokens"]:
    """Which patches each region has; ids outside 0..count-1 belong to none."""
    return regions[:, None] == torch.arange(count, device=regions.device)[None, :, None]


def additive(allowed: Bool[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """0 where allowed, -inf elsewhere."""
    return torch.zeros(allowed.shape, device=allowed.device).masked_fill_(~allowed, -torch.inf)


def downsample_majority(
    labels: Int64[Tensor, "batch rows columns"], factor: int
) -> Int64[Tensor, "batch low_rows low_columns"]:
    """The most frequent id of each factor x factor block, of equals the lowest.

    Source: card scg.md section 2 (a grouping grid to CLIP's). Deviates: Ding et al. let a patch belong to every mask
    that touches it.

    Raises:
        ValueError: sides that are no multiples of the factor.
    """
    _, rows, columns = labels.shape
    if rows % factor or columns % factor:
        raise ValueError(f"a grid of {rows}x{columns} has no whole blocks of {factor}x{factor}")
    blocks = labels.unflatten(2, (-1, factor)).unflatten(1, (-1, factor)).permute(0, 1, 3, 2, 4).flatten(3)
    # torch.mode promises no rule among equals.
    votes = (blocks[..., :, None] == blocks[..., None, :]).sum(-1)
    lowest = torch.where(votes == votes.amax(-1, keepdim=True), blocks, torch.iinfo(torch.int64).max)
    return lowest.amin(-1)


def context_vectors(
    tower: VisualTower,
    pixels: Float[Tensor, "batch 3 height width"],
    regions: Int64[Tensor, "batch tokens"],
    offsets: Float[Tensor, "depths regions inner"],
    *,
    extra_key: ExtraKey,
    frozen: bool,
) -> Float[Tensor, "batch regions dim"]:
    """Strategy c: vectors in the joint space, not normalised.

    A region token starts as the class token plus `offsets[0]`; with as many offsets as layers, `offsets[l]` is added
    before layer l too. Its attention sees its region's patches and one key more, its own ("self") or the class token's
    ("class_token"), so that no row is empty. Patches and class token are those of the plain tower; where it is `frozen`
    they run without gradients, and training pays for the region queries alone.
    """
    own = members(regions, offsets.shape[1])
    mask = additive(F.pad(own, (0, 1), value=True))[:, None]
    learns = torch.is_grad_enabled() and not frozen
    with torch.set_grad_enabled(learns):
        x = tower.embed(pixels)
    tokens = (tower.class_start.to(x.dtype) + offsets[0].to(x.dtype)).expand(len(x), -1, -1)
    for number, layer in enumerate(tower.layers):
        if number and len(offsets) > 1:
            tokens = tokens + offsets[number].to(x.dtype)
        with torch.set_grad_enabled(learns):
            seen = layer.qkv(x)
            x = layer.finish(x, attend(seen, layer.heads, None))
        tokens = _read(layer, tokens, seen[1], seen[2], mask, extra_key)
    return tower.project(tokens)


def _read(
    layer: Layer,
    tokens: Float[Tensor, "batch regions inner"],
    keys: Float[Tensor, "batch length inner"],
    values: Float[Tensor, "batch length inner"],
    mask: Float[Tensor, "batch 1 regions length"],
    extra_key: ExtraKey,
) -> Float[Tensor, "batch regions inner"]:
    """One layer for the region tokens: patches of the region, and the extra key last."""
    query, own_key, own_value = (heads_apart(x, layer.heads) for x in layer.qkv(tokens))
    keys, values = heads_apart(keys, layer.heads), heads_apart(values, layer.heads)
    if extra_key == "class_token":
        own_key, own_value = keys[:, :, :1], values[:, :, :1]
    scale = query.shape[-1] ** -0.5
    patch_scores = (query * scale) @ keys[:, :, 1:].transpose(-2, -1)
    own_scores = (query * scale * own_key).sum(-1, keepdim=True)
    weights = (torch.cat([patch_scores, own_scores], dim=-1) + mask.to(query.dtype)).softmax(dim=-1)
    mixed = weights[..., :-1].to(values.dtype) @ values[:, :, 1:] + weights[..., -1:].to(values.dtype) * own_value
    return layer.finish(tokens, mixed.transpose(1, 2).flatten(2))


def token_vectors(
    tower: VisualTower,
    pixels: Float[Tensor, "batch 3 height width"],
    regions: Int64[Tensor, "batch tokens"],
    count: int,
) -> Float[Tensor, "batch {count} dim"]:
    """Strategy b: as `count` towers on parts of the patches, packed into one sequence; class token as region token."""
    x = tower.embed(pixels)
    start = tower.class_start.to(x.dtype).expand(len(x), count, -1)
    own = torch.cat([torch.arange(count, device=x.device).expand(len(x), -1), regions], dim=1)
    mask = additive(own[:, :, None] == own[:, None, :])[:, None]
    found = run(tower, torch.cat([start, x[:, 1:]], dim=1), mask.to(x.dtype))
    return tower.project(found[:, :count])


def mean_vectors(
    patches: Float[Tensor, "batch tokens dim"], regions: Int64[Tensor, "batch tokens"], count: int
) -> Float[Tensor, "batch {count} dim"]:
    """No strategy of the paper: the mean of a region's patch vectors; of no patch it is zero."""
    owned = members(regions, count).to(patches.dtype)
    return owned @ patches / owned.sum(-1, keepdim=True).clamp(min=1)


def image_vectors(
    tower: VisualTower,
    pixels: Float[Tensor, "batch 3 height width"],
    regions: Int64[Tensor, "batch height width"],
    count: int,
    fill: Sequence[float],
) -> Float[Tensor, "batch {count} dim"]:
    """Strategy a: the class token of every image with all pixels outside a region set to `fill` (normalised RGB).

    A forward per region that has pixels; the others' vectors are zero.
    """
    blank = torch.tensor(fill, device=pixels.device, dtype=pixels.dtype)[:, None, None]
    rows = []
    for image, labels in zip(pixels, regions, strict=True):
        present = labels.unique()
        present = present[(present >= 0) & (present < count)]
        masked = torch.where(labels[None, None] == present[:, None, None, None], image, blank)
        vectors = tower.project(run(tower, tower.embed(masked)))[:, 0]
        rows.append(vectors.new_zeros(count, vectors.shape[1]).index_copy(0, present, vectors))
    return torch.stack(rows)
