"""Metrics of masks beside mIoU: how well boundaries fit, and how well regions fit objects before anything is named.

Axes: height and width in pixels of the stored image, classes, regions. All rates are fractions in [0, 1].
"""

from typing import Any

import cv2
import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipeline.metrics import as_labels

BAND = 0.02  # of the image's diagonal: how far a boundary reaches inwards. Source: Boundary IoU 3
_OUTSIDE = np.iinfo(np.uint16).max  # no class: beyond the image


def boundary_width(height: int, width: int) -> int:
    """Pixels; at least 1."""
    return max(1, round(BAND * float(np.hypot(height, width))))


def inner_boundary(labels: Int64[np.ndarray, "height width"], distance: int) -> Bool[np.ndarray, "height width"]:
    """Pixels that see another label, or the outside of the image, within `distance` (in rows and in columns).

    That is, for every class at once, its mask less the mask eroded `distance` times by 3 x 3.
    """
    padded = np.pad(labels.astype(np.uint16), 1, constant_values=_OUTSIDE)
    box = np.ones((2 * distance + 1, 2 * distance + 1), np.uint8)
    highest, lowest = cv2.dilate(padded, box), cv2.erode(padded, box)
    return ((highest != padded) | (lowest != padded))[1:-1, 1:-1]


class BoundaryIoU:
    """IoU per class of the inner boundaries of prediction and truth, summed over images.

    Source: "Boundary IoU" (Cheng et al., CVPR 2021); evaluation card section 7.2. What GroupViT's Table 3
    leaves open: at the stored resolution, void pixels in neither boundary, counts summed per class.
    """

    def __init__(self, num_classes: int, ignore_index: int | None = 255) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self._hit, self._predicted, self._truth = (torch.zeros(num_classes, dtype=torch.int64) for _ in range(3))

    def update(self, prediction: Any, label: Any) -> None:
        """Add one image of class ids; those of valid pixels lie in 0..num_classes-1, as `ConfusionMatrix` checks."""
        predicted, truth = (as_labels(values, "labels").cpu().numpy() for values in (prediction, label))
        distance = boundary_width(*truth.shape)
        valid = np.ones(truth.shape, bool) if self.ignore_index is None else truth != self.ignore_index
        bands = [inner_boundary(labels, distance) & valid for labels in (predicted, truth)]
        both = bands[0] & bands[1] & (predicted == truth)
        found = (truth[both], predicted[bands[0]], truth[bands[1]])
        for total, ids in zip((self._hit, self._predicted, self._truth), found, strict=True):
            total += torch.from_numpy(np.bincount(ids, minlength=self.num_classes))

    def iou(self) -> Float[Tensor, " classes"]:
        """Per class, float64; nan for a class that is in neither prediction nor truth."""
        return self._hit.double() / (self._predicted + self._truth - self._hit).double()

    def miou(self) -> float:
        """Mean over the classes that occur; nan without any."""
        return self.iou().nanmean().item()


def best_jaccard(counts: Int64[Tensor, "regions classes"], background: bool) -> float:
    """Mean over an image's objects of the best IoU that any region has with the object; nan without an object.

    An object is a class that occurs, other than class 0 where there is a `background`. `counts`: valid pixels of each
    region by true class (`metrics.region_counts`). Source: evaluation card section 7.3 (mask probing).
    """
    union = counts.sum(1, keepdim=True) + counts.sum(0, keepdim=True) - counts
    best = (counts.double() / union.clamp(min=1)).amax(0)
    objects = counts.sum(0) > 0
    if background:
        objects[0] = False
    return best[objects].mean().item()
