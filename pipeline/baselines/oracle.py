"""The upper bound of the pseudo-masks: each image's DINO clusters, named by the true masks.

Regions are made by the features and pseudo_masks stages' own functions and parameters from the benchmark's images. The
score is that of the majority label per region; the report has best IoU beside it. Comparable only at equal k and grid.

Source: S-Seg card section 11 (Table 1).
"""

from pipeline.baselines import RegionOracle
from pipeline.caching import image_masks
from pipeline.project import Project


def digests(project: Project) -> dict[str, str]:
    """The encoder's weights, and the parameters that turn its tokens into regions."""
    return image_masks.digests(project)


def build(project: Project) -> RegionOracle:
    """The baseline around the project's DINO encoder, on its device."""
    return RegionOracle(image_masks.load(project))
