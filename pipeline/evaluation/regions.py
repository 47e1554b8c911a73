"""How well a candidate's regions follow objects, whatever it calls them: the truth names them."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from pipeline.datasets.benchmarks import Benchmark, Sample
from pipeline.evaluation.rates import fraction
from pipeline.mask_metrics import best_jaccard
from pipeline.metrics import ConfusionMatrix, oracle_classes, region_counts

Regions = Callable[[UInt8[np.ndarray, "height width 3"]], Int64[Tensor, "height width"]]


class RegionScore:
    """mIoU when the truth names each region, by majority and by best IoU; and mask probing.

    `regions`: hard masks of an image, at its size. None: those of a model that does not group pixels, the classes that
    it predicts (card scg.md section 9, MaskCLIP in SCG's Table 1).
    """

    def __init__(self, benchmark: Benchmark, regions: Regions | None) -> None:
        classes, self._ignore = len(benchmark.classes), benchmark.ignore_index
        self._regions, self._background = regions, benchmark.has_background
        self._majority, self._best_iou = (ConfusionMatrix(classes, self._ignore) for _ in range(2))
        self._classes, self._numbers, self._jaccards = classes, list[int](), list[float]()

    def update(self, sample: Sample, predicted: Int64[Tensor, "height width"]) -> None:
        """Count an image and what was predicted of it."""
        found = predicted if self._regions is None else self._regions(sample.image)
        counts = region_counts(found, torch.tensor(sample.label), self._classes, self._ignore)
        self._majority.add_regions(counts, oracle_classes(counts, "majority"))
        self._best_iou.add_regions(counts, oracle_classes(counts, "best_iou"))
        self._numbers.append(int((counts.sum(1) > 0).sum()))
        self._jaccards.append(best_jaccard(counts, self._background))

    def report(self) -> dict[str, float | None]:
        """Fractions in [0, 1] over all images, and regions an image."""
        return {
            "mask_jaccard": fraction(torch.tensor(self._jaccards).nanmean().item()),
            "num_regions": round(sum(self._numbers) / max(len(self._numbers), 1), 2),
            "oracle_best_iou": fraction(self._best_iou.miou()),
            "oracle_majority": fraction(self._majority.miou()),
        }
