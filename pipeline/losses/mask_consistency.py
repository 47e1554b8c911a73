"""Cross-image consistency: an image's groups, painted on a partner image, must look like the partner's own masks.

The two images share an entity. Queries and keys are those of the grouping encoder's assignment; the partner's come from
a slow teacher without gradients, so the network is reached through the image's queries alone.

Source: OVSegmentor 3.2 (Eq. 10-12) and its release (card section 2.1); where they differ the print is an option of
`ConsistencyRules`, but for two things that are always the release's: maps are matched as logits, not as the sigmoids of
Eq. 10 and 11, and dice is smoothed, which Eq. 12's is not.
Deviates: the release sums the dice loss over the images of one GPU and divides by 8; here it is a mean over images, so
that its weight means the same for every batch size and number of GPUs (0.1 there, at 128 per GPU, is 1.6 here). A
constant map is squashed to zeros, where the release divides by zero.

Axes: batch, groups, tokens (patches), pixels of the partner image, dim.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipeline.losses.contrastive import Gather, own_rows
from pipeline.losses.parts import over_parts
from pipeline.nn.matching import assign
from pipeline.params import Range

SMOOTH = 1.0  # Source: the release's dice


@dataclass(frozen=True, kw_only=True, slots=True)
class ConsistencyRules:
    """How masks are chosen, matched and compared; released | printed.

    Attributes:
        keep: share of the groups, those that fit the entity best, that learn.
        rest: the other groups are `detach`ed (they stay in matching and dice) | `drop`ped on both sides.
        cost: of matching two maps: `euclidean` distance of the unit maps | negative `cosine`.
        threshold: a target pixel counts from `delta` times its mask's largest sigmoid on (`relative`) | from `delta` on
            (`absolute`).
        delta: see `threshold`; 0.6 | 0.65.
        squash: prediction to [0, 1] by its own `minmax` | `sigmoid`.
        dice: over all masks of an image at once (`joint`) | summed over masks (`per_mask`).
    """

    keep: Annotated[float, Range(0, 1, low_open=True)]
    rest: Literal["detach", "drop"]
    cost: Literal["euclidean", "cosine"]
    threshold: Literal["relative", "absolute"]
    delta: Annotated[float, Range(0, 1)]
    squash: Literal["minmax", "sigmoid"]
    dice: Literal["joint", "per_mask"]


def paint_groups(
    queries: Float[Tensor, "batch groups dim"],
    keys: Float[Tensor, "batch tokens dim"],
    grid: tuple[int, int],
    size: tuple[int, int],
) -> Float[Tensor, "batch groups pixels"]:
    """Scaled products of groups and patches (`grid` of them), upsampled to `size` (bilinear, corners aligned)."""
    logits = (queries @ keys.transpose(1, 2)) * queries.shape[-1] ** -0.5
    maps = F.interpolate(logits.unflatten(2, grid), size=size, mode="bilinear", align_corners=True)
    return maps.flatten(2)


def best_groups(scores: Float[Tensor, "batch groups"], keep: float) -> Int64[Tensor, "batch kept"]:
    """The groups with the highest scores, best first; at least one."""
    groups = scores.shape[1]
    # The release rounds the number of the others down.
    return scores.topk(max(1, groups - int(groups * (1 - keep))), dim=1).indices


def match(
    prediction: Float[Tensor, "batch groups pixels"],
    target: Float[Tensor, "batch groups pixels"],
    cost: Literal["euclidean", "cosine"],
) -> Int64[Tensor, "batch groups"]:
    """The prediction of each target, one to one, so that the summed cost of unit maps is least."""
    with torch.no_grad():
        one, two = F.normalize(prediction, dim=-1), F.normalize(target, dim=-1)
        cosine = one @ two.transpose(1, 2)
        costs = -cosine if cost == "cosine" else (2 - 2 * cosine).clamp(min=0).sqrt()
        return assign(costs, torch.ones_like(costs[:, 0], dtype=torch.bool))


def binary_targets(
    maps: Float[Tensor, "batch groups pixels"], threshold: Literal["relative", "absolute"], delta: float
) -> Float[Tensor, "batch groups pixels"]:
    """1 where the sigmoid reaches the threshold, else 0."""
    values = maps.sigmoid()
    least = delta * values.amax(dim=-1, keepdim=True) if threshold == "relative" else delta
    return (values >= least).to(maps.dtype)


def squash_minmax(maps: Float[Tensor, "batch groups pixels"]) -> Float[Tensor, "batch groups pixels"]:
    """Each map stretched to [0, 1]; a constant one becomes zeros."""
    low, high = maps.amin(dim=-1, keepdim=True), maps.amax(dim=-1, keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).eps)


def dice(
    prediction: Float[Tensor, "batch groups pixels"],
    target: Float[Tensor, "batch groups pixels"],
    kind: Literal["joint", "per_mask"],
) -> Float[Tensor, " batch"]:
    """1 - (2 intersection + 1) / (both areas + 1), of all masks together or summed over masks."""
    over = (1, 2) if kind == "joint" else (2,)
    shared, areas = (prediction * target).sum(over), prediction.sum(over) + target.sum(over)
    loss = 1 - (2 * shared + SMOOTH) / (areas + SMOOTH)
    return loss if kind == "joint" else loss.sum(1)


def mask_consistency(
    prediction: Float[Tensor, "batch groups pixels"],
    target: Float[Tensor, "batch groups pixels"],
    scores: Float[Tensor, "batch groups"],
    target_scores: Float[Tensor, "batch groups"],
    rules: ConsistencyRules,
) -> Float[Tensor, " batch"]:
    """One loss per image; all maps are logits. Scores say how well each group fits the shared entity.

    Raises:
        BadCost: a map is not finite.
    """
    best = best_groups(scores, rules.keep)
    if rules.rest == "drop":
        prediction = _pick(prediction, best)
        target = _pick(target, best_groups(target_scores, rules.keep))
    else:
        learns: Bool[Tensor, "batch groups"] = torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, True)
        prediction = torch.where(learns[..., None], prediction, prediction.detach())
    matched = _pick(prediction, match(prediction, target, rules.cost))
    shown = squash_minmax(matched) if rules.squash == "minmax" else matched.sigmoid()
    return dice(shown, binary_targets(target.detach(), rules.threshold, rules.delta), rules.dice)


@over_parts
def group_consistency(
    groups: Float[Tensor, "batch groups dim"],
    target: Float[Tensor, "batch groups dim"],
    scores: Float[Tensor, "batch groups"],
    target_scores: Float[Tensor, "batch groups"],
    paired: Bool[Tensor, " batch"],
    scale: Float[Tensor, ""],
    *,
    keep: float,
    gather: Gather = own_rows,
) -> Float[Tensor, ""]:
    """The rival objective of Table 6: matched groups of the two images attract, all others of the batch repel.

    The mean over the `paired` images of all processes, in each of them; 0 without any.

    Source: OVSegmentor 4.3, one sentence; our reading: the best groups of both sides, matched by negative cosine,
    InfoNCE from the image's groups over the groups of all partners.
    """
    one = F.normalize(_pick(groups, best_groups(scores, keep)), dim=-1)
    two = F.normalize(_pick(target, best_groups(target_scores, keep)), dim=-1)
    one, two = gather(_pick(one, match(one, two, "cosine")))[0], gather(two)[0]
    counts = gather(paired.byte())[0]
    logits = scale * one.flatten(0, 1) @ two.flatten(0, 1).T
    labels = torch.arange(len(logits), device=logits.device)
    losses = F.cross_entropy(logits, labels, reduction="none").unflatten(0, one.shape[:2]).mean(1)
    return (losses * counts).sum() / counts.sum().clamp(min=1)


def _pick(x: Float[Tensor, "batch groups width"], chosen: Int64[Tensor, "batch kept"]) -> Float[Tensor, "batch kept w"]:
    return x.gather(1, chosen[..., None].expand(-1, -1, x.shape[2]))
