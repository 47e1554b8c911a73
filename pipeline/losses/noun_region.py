"""Nouns of a caption against regions of a picture: SCG's contrastive loss.

Axes: nouns (of all captions of the batch, one after the other), batch, regions, dim. Vectors are unit vectors, scores
are cosines.

Source: SCG (arXiv 2304.01114) Eq. 1-3 and Table 5; card methods/scg.md section 5.
"""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipeline.losses.contrastive import Gather, own_rows
from pipeline.losses.parts import over_parts

Direction = Literal["noun_to_region", "region_to_noun", "both"]
Form = Literal["log", "printed"]


@over_parts
def loss(
    nouns: Float[Tensor, "nouns dim"],
    counts: Int64[Tensor, " pictures"],
    regions: Float[Tensor, "pictures regions dim"],
    present: Bool[Tensor, "pictures regions"],
    scale: Float[Tensor, ""],
    *,
    direction: Direction,
    form: Form,
    gather: Gather = own_rows,
) -> Float[Tensor, ""]:
    """Nouns, `counts` of each picture's caption one after the other, against regions; the mean of both directions.

    `present`: regions that the picture has. 0 where there is no picture. Source: Eq. 1 to 3, Table 5.
    """
    regions, nouns, counts = gather(regions)[0], gather(nouns)[0], gather(counts)[0]
    present, captions = gather(present.byte())[0].bool(), len(regions)
    if not captions:
        return scale * regions.sum()  # 0, as a value of all that was learned
    owner = torch.arange(captions, device=counts.device).repeat_interleave(counts)
    scores = []
    if direction != "region_to_noun":
        scores.append(noun_to_region(nouns, owner, regions, present, captions).scores)
    if direction != "noun_to_region":
        scores.append(region_to_noun(nouns, owner, regions, present, captions))
    return torch.stack([contrast(found, scale, form) for found in scores]).mean()


class Matches(NamedTuple):
    """scores: of each caption (rows) with each picture (columns). best: each noun's region in each picture."""

    scores: Float[Tensor, "captions pictures"]
    best: Int64[Tensor, "nouns pictures"]


def noun_to_region(
    nouns: Float[Tensor, "nouns dim"],
    owner: Int64[Tensor, " nouns"],
    regions: Float[Tensor, "pictures regions dim"],
    present: Bool[Tensor, "pictures regions"],
    captions: int,
) -> Matches:
    """Every noun takes its most similar region of each picture; a caption's score is the mean over its nouns.

    A caption without nouns scores 0 everywhere. Source: Eq. 1 and 2.
    """
    cosine = torch.einsum("nd,prd->npr", nouns, regions).masked_fill(~present, -torch.inf)
    best = cosine.max(dim=2)
    return Matches(mean_by_owner(best.values, owner, captions), best.indices)


def region_to_noun(
    nouns: Float[Tensor, "nouns dim"],
    owner: Int64[Tensor, " nouns"],
    regions: Float[Tensor, "pictures regions dim"],
    present: Bool[Tensor, "pictures regions"],
    captions: int,
) -> Float[Tensor, "captions pictures"]:
    """Every region takes its most similar noun of each caption; the score is the mean over the picture's regions.

    Source: Table 5. A caption without nouns scores 0 everywhere.
    """
    cosine = torch.einsum("nd,prd->npr", nouns, regions)
    start = cosine.new_full((captions, *cosine.shape[1:]), -torch.inf)
    places = owner[:, None, None].expand_as(cosine)
    best = start.scatter_reduce(0, places, cosine, "amax", include_self=False)
    counted = torch.where(present & best.isfinite(), best, 0.0)
    return counted.sum(2) / present.sum(1).clamp(min=1)


def mean_by_owner(
    values: Float[Tensor, "nouns pictures"], owner: Int64[Tensor, " nouns"], captions: int
) -> Float[Tensor, "{captions} pictures"]:
    """Mean over each caption's nouns; 0 where it has none."""
    sums = values.new_zeros(captions, values.shape[1]).index_add(0, owner, values)
    return sums / torch.bincount(owner, minlength=captions).clamp(min=1)[:, None]


def contrast(scores: Float[Tensor, "pairs pairs"], scale: Float[Tensor, ""], form: Form) -> Float[Tensor, ""]:
    """Each caption among the pictures and each picture among the captions, summed; the diagonal is right.

    "log": minus the mean log of each ratio (CLIP's loss, not halved). "printed": minus the mean ratio, in [-2, 0].

    Source: Eq. 3. Deviates: the equation has no logarithm; the text around it calls the loss contrastive and follows
    CLIP, so "log" is the default, and the gradient of "printed" vanishes where the answer is surely wrong.
    """
    logits = scale * scores
    if form == "log":
        right = torch.arange(len(logits), device=logits.device)
        return F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)
    return -(logits.softmax(1).diagonal().mean() + logits.softmax(0).diagonal().mean())
