"""A frozen CLIP's patches averaged inside each pseudo-mask, the averages named: no forward pass per region.

The plain counterpart of `masked_clip` and of SCG's region tokens: what regions give before anything is learned. No
paper's method. A patch counts in a region by the share of it that the region covers.
"""

from functools import partial

from pipeline.artifacts.weights import model_digest
from pipeline.baselines import project_clip
from pipeline.caching import image_masks
from pipeline.nn.region_clip import RegionClip, average_vectors
from pipeline.project import Project


def digests(project: Project) -> dict[str, str]:
    """The encoders' weights, and the parameters of the regions."""
    return {"clip": model_digest(project.encoder("clip")), **image_masks.digests(project)}


def build(project: Project) -> RegionClip:
    """The baseline around the project's CLIP and DINO encoders, on its device."""
    clip = project_clip(project)
    return RegionClip(clip, image_masks.load(project), partial(average_vectors, clip))
