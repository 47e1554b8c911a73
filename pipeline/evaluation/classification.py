"""Zero-shot classification on a segmentation benchmark: does a model know what a picture shows, wherever it is.

High beside a low mIoU, it says that names are learned and do not stay with their objects. An image's vector is compared
with the classes' as CLIP does on ImageNet; the images are those whose truth holds exactly one foreground class.
"""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.datasets.benchmarks import Benchmark
from pipeline.evaluation.rates import fraction
from pipeline.inference import PIXELS_AT_ONCE, ScoreModel, same_size, square_pixels


@runtime_checkable
class ImageModel(ScoreModel, Protocol):
    """A model with a vector of the whole image, in the space of its texts."""

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]: ...


@torch.inference_mode()
def classify(
    model: ImageModel,
    benchmark: Benchmark,
    ids: list[str],
    embeddings: Float[Tensor, "foreground dim"],
    side: int | None,
    device: str,
    step: Callable[[], object],
) -> dict[str, Any]:
    """Share of the images of one class whose nearest class vector is that class's, and how many images these are.

    Images are squashed to side x side pixels, or seen as they are stored. No share where there is no such image.
    """
    right, images, first = 0, 0, int(benchmark.has_background)
    for samples in benchmark.parts(ids):
        pictures, truths = [], []
        for sample in samples:
            found = np.setdiff1d(np.unique(sample.label), [benchmark.ignore_index, *range(first)])
            if len(found) == 1:
                pictures.append(square_pixels(sample.image, side, device))
                truths.append(int(found[0]))
            step()
        for batch in same_size(pictures, PIXELS_AT_ONCE):
            vectors = model.encode_image(torch.cat([pictures[index] for index in batch])).float()
            answers = (vectors @ embeddings.float().T).argmax(1) + first
            right += sum(answer == truths[index] for answer, index in zip(answers.tolist(), batch, strict=True))
        images += len(pictures)
    return {"image_accuracy": fraction(right / images if images else float("nan")), "num_one_class_images": images}
