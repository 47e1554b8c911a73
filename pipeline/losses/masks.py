"""Binary mask losses for sets of predicted masks: sigmoid focal and dice, pair by pair or all against all.

Axes: queries (predicted masks), targets (pseudo-masks), pixels (flattened, at the prediction's resolution), pairs.
`valid` marks the pixels that count (those inside the stored image). Everything is computed in fp32.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

# Source: MaskFormer release (focal loss of RetinaNet): weight of positives, exponent; dice: added to both sides of the
# fraction so that an empty pair costs nothing. Card sseg section 4.
FOCAL_ALPHA, FOCAL_GAMMA, DICE_SMOOTH = 0.25, 2.0, 1.0


def focal_parts(logits: Float[Tensor, "*shape"]) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """What a pixel costs if its target is 1, and if it is 0."""
    probability = logits.sigmoid()
    positive = FOCAL_ALPHA * (1 - probability) ** FOCAL_GAMMA * F.softplus(-logits)
    negative = (1 - FOCAL_ALPHA) * probability**FOCAL_GAMMA * F.softplus(logits)
    return positive, negative


def focal_loss(
    logits: Float[Tensor, "pairs pixels"], targets: Float[Tensor, "pairs pixels"], valid: Float[Tensor, "pairs pixels"]
) -> Float[Tensor, " pairs"]:
    """Sigmoid focal loss, mean over the valid pixels of each pair. Source: RetinaNet Eq. 5, S-Seg Eq. 1."""
    positive, negative = focal_parts(logits.float())
    return (torch.where(targets > 0.5, positive, negative) * valid).sum(dim=1) / valid.sum(dim=1).clamp(min=1)


def dice_loss(
    logits: Float[Tensor, "pairs pixels"], targets: Float[Tensor, "pairs pixels"], valid: Float[Tensor, "pairs pixels"]
) -> Float[Tensor, " pairs"]:
    """1 - (2 sum p t + 1) / (sum p + sum t + 1) of each pair, in [0, 1). Source: S-Seg Eq. 1, MaskFormer release.

    Deviates: V-Net squares the sums in the denominator; MaskFormer does not.
    """
    probability = logits.float().sigmoid() * valid
    overlap = 2 * (probability * targets).sum(dim=1)
    return 1 - (overlap + DICE_SMOOTH) / (probability.sum(dim=1) + targets.sum(dim=1) + DICE_SMOOTH)


def matching_cost(
    logits: Float[Tensor, "batch queries pixels"],
    targets: Float[Tensor, "batch targets pixels"],
    valid: Float[Tensor, "batch pixels"],
    *,
    focal_weight: float,
    dice_weight: float,
) -> Float[Tensor, "batch queries targets"]:
    """The weighted loss of every query paired with every target; no class cost. Source: S-Seg 3.4, card section 4."""
    logits, targets = logits.float(), targets.float()
    inside = valid[:, None]
    positive, negative = (part * inside for part in focal_parts(logits))
    across = targets.transpose(1, 2)
    focal = positive @ across + negative.sum(dim=2, keepdim=True) - negative @ across
    focal = focal / inside.sum(dim=2, keepdim=True).clamp(min=1)
    probability = logits.sigmoid() * inside
    sums = probability.sum(dim=2)[:, :, None] + targets.sum(dim=2)[:, None]
    dice = 1 - (2 * probability @ across + DICE_SMOOTH) / (sums + DICE_SMOOTH)
    return focal_weight * focal + dice_weight * dice


def matched_losses(
    logits: Float[Tensor, "batch queries pixels"],
    targets: Float[Tensor, "batch targets pixels"],
    valid: Float[Tensor, "batch pixels"],
    matched: Int64[Tensor, "batch targets"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Focal and dice loss of the matched pairs, each summed and divided by the number of pairs (at least 1).

    `matched` is the query of each target, -1 for a target that is not there. Queries without a target get no gradient.
    """
    image, target = (matched >= 0).nonzero(as_tuple=True)
    pairs = max(len(image), 1)
    predicted, wanted, inside = logits[image, matched[image, target]], targets[image, target].float(), valid[image]
    return focal_loss(predicted, wanted, inside).sum() / pairs, dice_loss(predicted, wanted, inside).sum() / pairs


class Targets(NamedTuple):
    """Binary masks of a batch; `present` tells which of them hold a pixel, `valid` which pixels count."""

    masks: Float[Tensor, "batch targets pixels"]
    present: Bool[Tensor, "batch targets"]
    valid: Float[Tensor, "batch pixels"]


def split_regions(regions: Shaped[Tensor, "batch pixels"], outside: int) -> Targets:
    """Integer label maps as binary masks, one for each label up to the largest.

    A label without a pixel is not present: as a target it would be an all-zero mask. Pixels labelled `outside` (beyond
    the stored image) belong to no mask and do not count. Source: card sseg section 14 (all-zero targets).
    """
    valid = regions != outside
    num_labels = int(torch.where(valid, regions, 0).max()) + 1
    labels = torch.arange(num_labels, device=regions.device, dtype=regions.dtype)
    masks = (regions[:, None] == labels[:, None]) & valid[:, None]
    return Targets(masks.float(), masks.any(dim=2), valid.float())
