"""A frozen CLIP's patches gathered by mean-shift: GroupViT's Table 4, row "Mean-shift" (20.7 on VOC).

Flat kernel; the bandwidth is estimated from each window's own tokens, so the number of groups varies. Source: SCG card
section 12.
"""

from dataclasses import dataclass
from typing import Annotated

from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.baselines import clip_digests, project_clip
from pipeline.nn.grouped_clip import GroupedClip
from pipeline.nn.token_groups import mean_distance, mean_shift
from pipeline.params import Range
from pipeline.project import Project

BLOCK = "baselines.clip_mean_shift"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Block `baselines.clip_mean_shift`.

    Attributes:
        quantile: share of a window's tokens that a kernel reaches, on average.
        max_iters: moves of a mean, at most.
    """

    quantile: Annotated[float, Range(0, 1)]
    max_iters: Annotated[int, Range(1)]


def digests(project: Project) -> dict[str, str]:
    """The encoder's weights, and the parameters."""
    return clip_digests(project, BLOCK, Config)


def build(project: Project) -> GroupedClip:
    """The baseline around the project's CLIP encoder, on its device."""
    config = project.config(BLOCK, Config)

    def cluster(tokens: Float[Tensor, "tokens dim"], seed: int) -> Int64[Tensor, " tokens"]:
        return mean_shift(tokens, mean_distance(tokens, config.quantile), config.max_iters)

    return GroupedClip(project_clip(project), cluster)
