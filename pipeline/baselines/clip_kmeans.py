"""A frozen CLIP's patches gathered by k-means, the groups named: GroupViT's Table 4, row "K-means" (25.0 on VOC).

`clip_patches` is the same without groups. Source: SCG card section 12.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.baselines import clip_digests, project_clip
from pipeline.clustering import kmeans
from pipeline.nn.grouped_clip import GroupedClip
from pipeline.params import Range
from pipeline.project import Project

BLOCK = "baselines.clip_kmeans"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Block `baselines.clip_kmeans`.

    Attributes:
        k: groups of a window, at most.
        iters: k-means iterations, at most.
    """

    k: Annotated[int, Range(1)]
    iters: Annotated[int, Range(1)]


def digests(project: Project) -> dict[str, str]:
    """The encoder's weights, and the parameters."""
    return clip_digests(project, BLOCK, Config)


def build(project: Project) -> GroupedClip:
    """The baseline around the project's CLIP encoder, on its device."""
    config = project.config(BLOCK, Config)

    def cluster(tokens: Float[Tensor, "tokens dim"], seed: int) -> Int64[Tensor, " tokens"]:
        seeds = torch.tensor([seed], device=tokens.device)
        labels, _ = kmeans(tokens[None], config.k, iters=config.iters, metric="euclidean", seeds=seeds)
        return labels[0]

    return GroupedClip(project_clip(project), cluster)
