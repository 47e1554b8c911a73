"""Counts as the figures of a report: fractions in [0, 1], rounded for storage, null where a rate is of nothing."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64

from pipeline.datasets.benchmarks import Benchmark
from pipeline.evaluation.resampling import spread
from pipeline.metrics import ConfusionMatrix, ThresholdSweep

DIGITS = 10  # of a stored fraction: an independent count of the same label maps agrees to 1e-9
THRESHOLD_DIGITS = 6  # of a stored threshold, which is a float32
CURVE_POINTS = 20  # intervals of the stored sweep, unless it has few more thresholds; its maximum is exact


def curve(sweep: ThresholdSweep) -> dict[str, Any]:
    """The test split's own best threshold, never used for the score, and the curve around it."""
    value, miou = sweep.best()
    scores = sweep.miou().tolist()
    intervals = len(scores) - 1 if len(scores) <= 2 * CURVE_POINTS else CURVE_POINTS
    shown = sorted({round(index * (len(scores) - 1) / max(intervals, 1)) for index in range(intervals + 1)})
    return {
        "best_miou": fraction(miou),
        "best_threshold": value,
        "chosen_on": "test split (not used for the score)",
        "miou": [fraction(scores[index]) for index in shown],
        "thresholds": [round(sweep.thresholds[index].item(), THRESHOLD_DIGITS) for index in shown],
    }


def figures(counts: ConfusionMatrix, benchmark: Benchmark) -> dict[str, Any]:
    """Every rate of a confusion matrix, and the best single label's mIoU beside them."""
    label, constant = counts.constant()
    return {
        "aacc": fraction(counts.aacc()),
        "constant_label": benchmark.classes[label],
        "constant_miou": fraction(constant),
        "fg_accuracy": fraction(counts.foreground_accuracy()) if benchmark.has_background else None,
        "macc": fraction(counts.macc()),
        "miou": fraction(counts.miou()),
        "per_class": {
            name: fraction(value) for name, value in zip(benchmark.classes, counts.iou().tolist(), strict=True)
        },
    }


def uncertainty(areas: Int64[np.ndarray, "images 3 classes"]) -> dict[str, Any]:
    """The interval around the mIoU that other images of the kind would give, and its standard error."""
    low, high, error = spread(areas)
    return {"miou_error": fraction(error), "miou_interval": [fraction(low), fraction(high)]}


def by_split(counts: ConfusionMatrix, benchmark: Benchmark) -> dict[str, Any]:
    """mIoU over the classes that the data file names together, and over all others, from the same predictions."""
    iou, found = counts.iou(), {}
    for name, ids in benchmark.layout.get("splits", {}).items():
        chosen = torch.zeros(len(iou), dtype=torch.bool)
        chosen[ids] = True
        members = [benchmark.classes[index] for index in ids]
        rates = (fraction(iou[part].nanmean().item()) for part in (chosen, ~chosen))
        found[name] = dict(zip(("classes", "miou", "others_miou"), (members, *rates), strict=True))
    return {"splits": found}


def brief(described: dict[str, Any], counts: ConfusionMatrix, benchmark: Benchmark) -> dict[str, Any]:
    """What stands in the report of a background rule that is not the first."""
    rates = figures(counts, benchmark)
    best = described["sweep"] and {key: described["sweep"][key] for key in ("best_miou", "best_threshold")}
    return {
        **{key: rates[key] for key in ("aacc", "fg_accuracy", "macc", "miou")},
        "stuff_words": described["stuff_words"],
        "sweep": best,
        "threshold": described["threshold"],
    }


def confused(counts: ConfusionMatrix, classes: Sequence[str], number: int) -> list[dict[str, Any]]:
    """What was taken for what: the `number` mistakes of the most pixels, the largest first.

    `share` is of all valid pixels, `of_truth` of the true class's. Of equal ones the lower classes come first.
    """
    matrix = counts.counts
    total, cells = int(matrix.sum()), matrix.clone()
    cells.fill_diagonal_(0)
    order = sorted(cells.nonzero().tolist(), key=lambda cell: (-int(cells[cell[0], cell[1]]), cell))
    return [
        {
            "answer": classes[j],
            "of_truth": fraction(int(cells[i, j]) / int(matrix[i].sum())),
            "share": fraction(int(cells[i, j]) / total),
            "truth": classes[i],
        }
        for i, j in order[:number]
    ]


def fraction(value: float) -> float | None:
    """Rounded for storage; nan, a rate of nothing, is null."""
    return None if math.isnan(value) else round(value, DIGITS)
