"""Zero-shot classification on a segmentation benchmark: does a model know what a picture shows, wherever it is.

High beside a low mIoU, it says that names are learned and do not stay with their objects. An image's vector is compared
with the classes' as CLIP does on ImageNet; the images are those whose truth holds exactly one foreground class.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.datasets.benchmarks import Benchmark, Sample
from pipeline.evaluation.rates import fraction
from pipeline.evaluation.whole_images import whole_pixels
from pipeline.inference import PIXELS_AT_ONCE, Geometry, ScoreModel, same_size


@runtime_checkable
class ImageModel(ScoreModel, Protocol):
    """A model with a vector of the whole image, in the space of its texts."""

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]: ...


class Classification:
    """Share of the images of one class whose nearest class vector is that class's, and how many images these are.

    Images are seen whole (`whole_pixels`). No share where there is no such image.
    """

    def __init__(
        self,
        model: ImageModel,
        benchmark: Benchmark,
        embeddings: Float[Tensor, "foreground dim"],
        geometry: Geometry,
        device: str,
    ) -> None:
        self._model, self._embeddings, self._device = model, embeddings.float(), device
        self._geometry = geometry.fitting(model)
        self._first, self._ignore = int(benchmark.has_background), benchmark.ignore_index
        self._right = self._images = 0

    @torch.inference_mode()
    def update(self, samples: Sequence[Sample]) -> None:
        """Count those of the images that show one class."""
        pictures, truths = [], []
        for sample in samples:
            found = np.setdiff1d(np.unique(sample.label), [self._ignore, *range(self._first)])
            if len(found) == 1:
                pictures.append(whole_pixels(sample.image, self._geometry, self._device))
                truths.append(int(found[0]))
        for batch in same_size(pictures, PIXELS_AT_ONCE):
            vectors = self._model.encode_image(torch.cat([pictures[index] for index in batch])).float()
            answers = (vectors @ self._embeddings.T).argmax(1) + self._first
            self._right += sum(answer == truths[index] for answer, index in zip(answers.tolist(), batch, strict=True))
        self._images += len(pictures)

    def report(self) -> dict[str, Any]:
        """A fraction in [0, 1], and a count."""
        share = self._right / self._images if self._images else float("nan")
        return {"image_accuracy": fraction(share), "num_one_class_images": self._images}
