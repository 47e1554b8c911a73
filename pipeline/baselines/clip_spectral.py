"""A frozen CLIP's patches gathered by normalised cuts: GroupViT's Table 4, row "Spectral clustering" (19.7 on VOC).

The affinity of two patches is their cosine, at least 0. Source: SCG card section 12.
"""

from dataclasses import dataclass
from typing import Annotated

from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.baselines import clip_digests, project_clip
from pipeline.nn.grouped_clip import GroupedClip
from pipeline.nn.token_groups import Assign, spectral
from pipeline.params import Range
from pipeline.project import Project

BLOCK = "baselines.clip_spectral"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Block `baselines.clip_spectral`.

    Attributes:
        k: groups of a window, at most.
        assign: how the spectral embedding becomes groups (scikit-learn's `assign_labels`).
    """

    k: Annotated[int, Range(1)]
    assign: Assign


def digests(project: Project) -> dict[str, str]:
    """The encoder's weights, and the parameters."""
    return clip_digests(project, BLOCK, Config)


def build(project: Project) -> GroupedClip:
    """The baseline around the project's CLIP encoder, on its device."""
    config = project.config(BLOCK, Config)

    def cluster(tokens: Float[Tensor, "tokens dim"], seed: int) -> Int64[Tensor, " tokens"]:
        return spectral(tokens @ tokens.T, config.k, config.assign)

    return GroupedClip(project_clip(project), cluster)
