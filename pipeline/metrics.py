"""Segmentation metrics: dataset-level confusion counts, a sweep of background thresholds, oracle labels of regions.

Axes: truth and predicted (classes), height and width in pixels, regions. Labels are integers in 0..num_classes-1 or
`ignore_index`; all rates are fractions in [0, 1].
"""

from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

OracleRule = Literal["majority", "best_iou"]


def as_labels(values: Any, name: str) -> Shaped[Tensor, "..."]:
    """An integer tensor of any array.

    Raises:
        TypeError: the values are floats or booleans, which are no labels.
    """
    if isinstance(values, np.ndarray) and not values.flags.writeable:
        values = values.copy()  # torch warns about sharing memory that it must not write to
    labels = torch.as_tensor(values)
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise TypeError(f"{name}: expected integer labels, found {labels.dtype}")
    return labels.to(torch.int64)


def check_ids(labels: Int64[Tensor, " pixels"], num_classes: int, name: str) -> None:
    """Raise ValueError naming the ids outside 0..num_classes-1."""
    wrong = (labels < 0) | (labels >= num_classes)
    if wrong.any():
        ids = ", ".join(str(value) for value in labels[wrong].unique().tolist()[:8])
        raise ValueError(f"{name} holds ids outside 0..{num_classes - 1}: {ids}")


class ConfusionMatrix:
    """Pixels by true and predicted class, summed over images.

    `counts[t, p]` is the number of pixels of class t predicted as p; pixels labelled `ignore_index` are left out,
    whatever is predicted there.

    Source: evaluation card section 7.1.
    Deviates: mmsegmentation drops label ids >= num_classes from its label histogram while their predictions still
    count as false positives; here they raise.
    """

    def __init__(self, num_classes: int, ignore_index: int | None = 255) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes: expected at least 1, found {num_classes}")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        self.counts: Int64[Tensor, "truth predicted"] = torch.zeros(num_classes, num_classes, dtype=torch.int64)

    def update(self, prediction: Any, label: Any) -> None:
        """Add one image (or any equally shaped pair of integer arrays).

        Raises:
            ValueError: shapes differ, or an id that counts lies outside 0..num_classes-1.
            TypeError: labels are not integers.
        """
        predicted, truth = as_labels(prediction, "prediction"), as_labels(label, "label")
        if predicted.shape != truth.shape:
            raise ValueError(f"prediction has shape {tuple(predicted.shape)}, label {tuple(truth.shape)}")
        predicted, truth = predicted.reshape(-1).cpu(), truth.reshape(-1).cpu()
        if self.ignore_index is not None:
            valid = truth != self.ignore_index
            predicted, truth = predicted[valid], truth[valid]
        check_ids(truth, self.num_classes, "label")
        check_ids(predicted, self.num_classes, "prediction")
        pairs = truth * self.num_classes + predicted
        self.counts += torch.bincount(pairs, minlength=self.num_classes**2).view_as(self.counts)

    def add_regions(self, counts: Int64[Tensor, "regions truth"], predicted: Int64[Tensor, " regions"]) -> None:
        """Add one image in which all of region r's pixels, `counts[r]` by true class, are predicted as one class."""
        self.counts.index_add_(1, predicted.cpu(), counts.T.cpu())

    def merge(self, other: "ConfusionMatrix") -> None:
        """Add another matrix's pixels. Raises ValueError when the class counts differ."""
        if other.num_classes != self.num_classes:
            raise ValueError(f"cannot merge {other.num_classes} classes into {self.num_classes}")
        self.counts += other.counts

    def iou(self) -> Float[Tensor, " truth"]:
        """IoU per class, float64; nan for a class that is in neither prediction nor truth."""
        hit, predicted, truth = self.counts.diagonal(), self.counts.sum(0), self.counts.sum(1)
        return hit.double() / (predicted + truth - hit).double()

    def miou(self) -> float:
        """Mean IoU over the classes that occur (background is one of them); nan without any valid pixel."""
        return self.iou().nanmean().item()

    def aacc(self) -> float:
        """Share of valid pixels whose class is right; nan without any."""
        return (self.counts.diagonal().sum().double() / self.counts.sum().double()).item()

    def macc(self) -> float:
        """Mean over the classes of the truth of their pixels' share that is right."""
        return (self.counts.diagonal().double() / self.counts.sum(1).double()).nanmean().item()

    def foreground_accuracy(self, background: int = 0) -> float:
        """Share of the pixels whose true class is not `background` that got their class; nan without any."""
        foreground = torch.arange(self.num_classes) != background
        hit, truth = self.counts.diagonal()[foreground], self.counts[foreground]
        return (hit.sum().double() / truth.sum().double()).item()

    def constant(self) -> tuple[int, float]:
        """The single label that would score best on the counted truth, and its mIoU.

        With label c everywhere its IoU is its share of the pixels and that of every other true class is 0.
        """
        truth = self.counts.sum(1)
        label = int(truth.argmax())
        present = int((truth > 0).sum())
        return label, (truth[label].double() / truth.sum() / present).item() if present else float("nan")


class ThresholdSweep:
    """mIoU for every background threshold of a grid, from one pass over the images.

    A pixel whose best class score lies below the threshold becomes background (class 0), any other keeps its best
    class. Counts by score bin suffice: the matrix of no threshold is ever stored, and memory does not grow with pixels.
    """

    def __init__(self, thresholds: Iterable[float], num_classes: int, ignore_index: int | None = 255) -> None:
        self.thresholds = torch.tensor(sorted(set(thresholds)), dtype=torch.float32)
        if not len(self.thresholds):
            raise ValueError("thresholds: expected at least one")
        self.num_classes, self.ignore_index = num_classes, ignore_index
        bins = len(self.thresholds) + 1  # bin b: exactly the first b thresholds keep the pixel
        self._won = torch.zeros(bins, num_classes, dtype=torch.int64)
        self._hit = torch.zeros(bins, num_classes, dtype=torch.int64)
        self._true_background = torch.zeros(bins, dtype=torch.int64)
        self._truth = torch.zeros(num_classes, dtype=torch.int64)

    def update(self, best: Float[Tensor, "height width"], winner: Any, label: Any) -> None:
        """Add one image: the best score, its class id and the true class id of every pixel.

        Raises:
            ValueError: shapes differ, or an id lies outside 0..num_classes-1.
        """
        won, truth = as_labels(winner, "winner").reshape(-1).cpu(), as_labels(label, "label").reshape(-1).cpu()
        score = best.reshape(-1).float().cpu()
        if not score.shape == won.shape == truth.shape:
            raise ValueError(f"best, winner and label have {score.numel()}, {won.numel()} and {truth.numel()} pixels")
        if self.ignore_index is not None:
            valid = truth != self.ignore_index
            score, won, truth = score[valid], won[valid], truth[valid]
        check_ids(truth, self.num_classes, "label")
        check_ids(won, self.num_classes, "winner")
        bins = torch.bucketize(score, self.thresholds, right=True)
        size, shape = self._won.numel(), self._won.shape
        self._won += torch.bincount(bins * self.num_classes + won, minlength=size).view(shape)
        right = won == truth
        self._hit += torch.bincount((bins * self.num_classes + won)[right], minlength=size).view(shape)
        self._true_background += torch.bincount(bins[truth == 0], minlength=len(self._true_background))
        self._truth += torch.bincount(truth, minlength=self.num_classes)

    def miou(self) -> Float[Tensor, " thresholds"]:
        """mIoU at each threshold, float64."""
        kept = self._won.flip(0).cumsum(0).flip(0)[1:]  # row t: pixels that threshold t keeps, by class
        hit = self._hit.flip(0).cumsum(0).flip(0)[1:]
        dropped = self._truth.sum() - kept.sum(1)
        hit_background = hit[:, 0] + self._true_background.cumsum(0)[:-1]
        predicted = torch.cat([(kept[:, 0] + dropped)[:, None], kept[:, 1:]], dim=1)
        hits = torch.cat([hit_background[:, None], hit[:, 1:]], dim=1)
        iou = hits.double() / (predicted + self._truth - hits).double()
        return iou.nanmean(dim=1)

    def best(self) -> tuple[float, float]:
        """The threshold with the highest mIoU (of equals the lowest) and that mIoU; nan scores never win."""
        scores = self.miou().nan_to_num(-1.0)
        index = int(scores.argmax())
        return round(self.thresholds[index].item(), 6), scores[index].item()


def region_counts(
    regions: Shaped[Tensor, "height width"],
    label: Shaped[Tensor, "height width"],
    num_classes: int,
    ignore_index: int | None = 255,
) -> Int64[Tensor, "regions classes"]:
    """Valid pixels of each region by true class; region ids are row numbers, ids that do not occur are empty rows.

    Raises ValueError on negative region ids or on label ids outside the classes.
    """
    region, truth = as_labels(regions, "regions").reshape(-1), as_labels(label, "label").reshape(-1)
    num_regions = int(region.max()) + 1
    if region.min() < 0:
        raise ValueError(f"regions hold the id {int(region.min())}: expected 0 or more")
    if ignore_index is not None:
        valid = truth != ignore_index
        region, truth = region[valid], truth[valid]
    check_ids(truth, num_classes, "label")
    counts = torch.bincount(region * num_classes + truth, minlength=num_regions * num_classes)
    return counts.view(num_regions, num_classes)


def oracle_classes(counts: Int64[Tensor, "regions classes"], rule: OracleRule) -> Int64[Tensor, " regions"]:
    """The class that the truth gives each region of one image; background is a class like others.

    "majority": the class of most valid pixels of the region. "best_iou": the class whose mask in this image has the
    highest IoU with the region. Of equals the lowest class wins; a region without valid pixels becomes class 0.

    Source: S-Seg card section 11 (majority), evaluation card section 7.4 (best IoU, as GroupViT C.3).
    """
    if rule == "majority":
        return counts.argmax(1)
    union = counts.sum(1, keepdim=True) + counts.sum(0, keepdim=True) - counts
    return (counts.double() / union.clamp(min=1).double()).argmax(1)


def oracle_labels(
    regions: Shaped[Tensor, "height width"],
    label: Shaped[Tensor, "height width"],
    num_classes: int,
    rule: OracleRule,
    ignore_index: int | None = 255,
) -> Int64[Tensor, "height width"]:
    """The label map in which every region has its oracle class."""
    counts = region_counts(regions, label, num_classes, ignore_index)
    return oracle_classes(counts, rule)[as_labels(regions, "regions")]
