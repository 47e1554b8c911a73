"""MaskCLIP (Zhou et al., ECCV 2022) with key smoothing and prompt denoising, which its shipped configs leave out.

The paper's 25.5 on Context is this one. Source: SCG card section 11. Smoothed scores are at most 1, and below 0
where the keys of two patches point apart: they are no probabilities (`constant_logit` is refused).
"""

from dataclasses import dataclass
from typing import Annotated

from pipeline.baselines import clip_digests, project_clip
from pipeline.nn.maskclip import KeyAxis, MaskClip, Refinement
from pipeline.params import Range
from pipeline.project import Project

BLOCK = "baselines.maskclip_refined"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Block `baselines.maskclip_refined`; see `pipeline.nn.maskclip.Refinement`.

    Attributes:
        logit_scale: of cosines before the softmax; None: the CLIP's own.
        key_smoothing: best probability below which a patch is smoothed; 1: every patch; None: none.
        key_axis: "channels" (the paper's cosine) or "tokens" (the release).
        prompt_denoising: best probability below which a class is dropped; None: no class.
    """

    logit_scale: Annotated[float, Range(0, low_open=True)] | None
    key_smoothing: Annotated[float, Range(0, 1)] | None
    key_axis: KeyAxis
    prompt_denoising: Annotated[float, Range(0, 1)] | None


def digests(project: Project) -> dict[str, str]:
    """The encoder's weights, and the parameters."""
    return clip_digests(project, BLOCK, Config)


def build(project: Project) -> MaskClip:
    """The baseline around the project's CLIP encoder, on its device.

    Raises:
        ValueError: a CLIP whose class token was not trained.
    """
    config = project.config(BLOCK, Config)
    refinement = Refinement(
        key_smoothing=config.key_smoothing, key_axis=config.key_axis, prompt_denoising=config.prompt_denoising
    )
    return MaskClip(project_clip(project), config.logit_scale, refinement, bare=False)
