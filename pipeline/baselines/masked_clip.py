"""Every pseudo-mask shown alone to a frozen CLIP: S-Seg's baseline B1, and SCG's strategy (a) on per-image masks.

The rest of the window is blanked, the CLIP's image vector names the region. The papers' figures differ by far with the
region source and the background rule: 12.9 / 3.9 / 2.9 (S-Seg Table 3), 39.1 on VOC (SCG Table 3, its own regions and
extra words for background). Source: S-Seg card section 10; fill, prompt and background rule are not given there.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch

from pipeline.baselines import clip_digests, project_clip
from pipeline.caching import image_masks
from pipeline.nn.region_clip import RegionClip, blanked_vectors
from pipeline.project import Project

BLOCK = "baselines.masked_clip"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Block `baselines.masked_clip`.

    Attributes:
        fill: colour outside the region: "mean" (the CLIP's, zero after normalisation) or "black".
    """

    fill: Literal["mean", "black"]


def digests(project: Project) -> dict[str, str]:
    """The encoders' weights, and the parameters of regions and fill."""
    return clip_digests(project, BLOCK, Config) | image_masks.digests(project)


def build(project: Project) -> RegionClip:
    """The baseline around the project's CLIP and DINO encoders, on its device."""
    config, clip = project.config(BLOCK, Config), project_clip(project)
    black = -torch.tensor(clip.mean) / torch.tensor(clip.std)
    fill = torch.zeros(3) if config.fill == "mean" else black
    return RegionClip(clip, image_masks.load(project), partial(blanked_vectors, clip, fill=fill))
