"""Label 0 everywhere: all background, the floor that any threshold reaches.

mIoU is the background's share of the pixels divided by the number of classes, so it says how hard a benchmark is.
"""

import torch
from jaxtyping import Int64
from torch import Tensor

from pipeline.datasets.benchmarks import Sample
from pipeline.project import Project


class Constant:
    """The first class of the list, whatever the image."""

    def label(self, sample: Sample, num_classes: int, ignore_index: int) -> Int64[Tensor, "height width"]:
        """Zeros of the label map's size."""
        return torch.zeros(sample.label.shape, dtype=torch.int64)


def digests(project: Project) -> dict[str, str]:
    """Nothing: there are no weights."""
    return {}


def build(project: Project) -> Constant:
    """The baseline; it reads no parameter."""
    return Constant()
