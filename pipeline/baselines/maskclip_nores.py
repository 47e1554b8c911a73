"""MaskCLIP without the residual and the MLP of the last layer: its values alone.

Not MaskCLIP (Zhou et al.), which keeps both: ClearCLIP and NACLIP find this the largest gain. Source: SCG card
section 11. Scores are probabilities over the words asked for.
"""

from dataclasses import dataclass
from typing import Annotated

from pipeline.baselines import clip_digests, project_clip
from pipeline.nn.maskclip import UNREFINED, MaskClip
from pipeline.params import Range
from pipeline.project import Project

BLOCK = "baselines.maskclip_nores"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Block `baselines.maskclip_nores`.

    Attributes:
        logit_scale: of cosines before the softmax; None: the CLIP's own.
    """

    logit_scale: Annotated[float, Range(0, low_open=True)] | None


def digests(project: Project) -> dict[str, str]:
    """The encoder's weights, and the parameters."""
    return clip_digests(project, BLOCK, Config)


def build(project: Project) -> MaskClip:
    """The baseline around the project's CLIP encoder, on its device.

    Raises:
        ValueError: a CLIP whose class token was not trained.
    """
    config = project.config(BLOCK, Config)
    return MaskClip(project_clip(project), config.logit_scale, UNREFINED, bare=True)
