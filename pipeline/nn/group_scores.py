"""What a grouping model answers for one window: how sure each group is of each class, and where the groups lie.

A group is one of the few regions into which a grouping encoder gathers an image's patches. Its classes are read from
its segment token, its place from the soft assignments of all stages multiplied together. Pixels take the class scores
of the one group that owns them.

Axes: groups, classes, dim of the space shared with text; rows and columns of the patch grid, or of the pixels that it
is painted on. Confidences lie in [0, 1].

Source: GroupViT card section 9 steps 2 to 6 (released code; OVSegmentor card 6 and ZeroSeg card 6 use the same).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

TOP_CLASSES = 5  # classes that one window may show. Source: GroupViT's released evaluation, card 9 step 5


class GroupScores(NamedTuple):
    """The groups of one window.

    confidence: of every group in every class, [0, 1]. maps: the group's share of each patch, the product of the stages'
    soft assignments; sums to 1 over groups.
    """

    confidence: Float[Tensor, "groups classes"]
    maps: Float[Tensor, "groups rows columns"]


def group_confidence(
    segments: Float[Tensor, "groups dim"],
    image: Float[Tensor, " dim"],
    classes: Float[Tensor, "classes dim"],
    scale: float,
    top: int = TOP_CLASSES,
) -> Float[Tensor, "groups classes"]:
    """P1 * P2: the softmax over all classes times the softmax over the `top` classes that the whole image resembles.

    Vectors are unit vectors and `scale` is the inverse temperature of the contrastive training, so that a logit is
    scale * cosine. Classes outside the image's best have confidence 0; of equal ones just `top` are kept. With no more
    classes than `top` all are kept and the result is P1 squared.

    Source: GroupViT card section 9 step 5 (the paper's text has the first factor only).
    """
    logits = scale * segments.float() @ classes.float().T
    kept = (image.float() @ classes.float().T).topk(min(top, len(classes))).indices
    gate = torch.full_like(logits[0], -torch.inf)
    gate[kept] = 0.0
    return logits.softmax(1) * (logits + gate).softmax(1)


def hard_groups(maps: Float[Tensor, "groups rows columns"], size: tuple[int, int]) -> Int64[Tensor, "height width"]:
    """The group of each pixel at `size`; of equal shares the lowest group.

    The soft maps are upsampled first (bilinear, half-pixel centres) and the largest is taken then, so that borders
    between groups are finer than the patch grid.

    Source: GroupViT card section 9 step 2.
    """
    maps = maps.float()
    if tuple(maps.shape[1:]) != tuple(size):
        maps = F.interpolate(maps[None], tuple(size), mode="bilinear", align_corners=False)[0]
    return maps.max(0).indices  # many times faster than argmax over the first axis


def paint(scores: GroupScores, size: tuple[int, int]) -> Float[Tensor, "classes height width"]:
    """Class scores of each pixel at `size`: the confidences of the group that owns it.

    Source: GroupViT card section 9 step 6, without background.
    """
    return scores.confidence.T[:, hard_groups(scores.maps, size)]
