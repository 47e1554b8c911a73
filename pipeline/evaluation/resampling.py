"""How far a benchmark's mIoU would move with other images of the same kind: a bootstrap over the images.

Axes: images, areas (intersection, prediction, truth; pixels), classes, draws.
"""

import numpy as np
from jaxtyping import Float, Int64

DRAWS = 1000
SEED = 0
COVERED = 95.0  # percent of the draws inside the interval
# Draws at once: their weights are as many float64 as images.
_CHUNK = 100


def resampled_miou(areas: Int64[np.ndarray, "images 3 classes"]) -> Float[np.ndarray, " draws"]:
    """mIoU of as many images drawn with replacement, `DRAWS` times; the same draws for every model of a benchmark.

    Draws of images without a pixel that counts have no mIoU and are left out; some image must have one.
    """
    images, flat = len(areas), areas.reshape(len(areas), -1).astype(np.float64)
    rng, found = np.random.default_rng(SEED), []
    for start in range(0, DRAWS, _CHUNK):
        times = rng.multinomial(images, np.full(images, 1 / images), size=min(_CHUNK, DRAWS - start))
        hit, predicted, truth = np.moveaxis((times @ flat).reshape(len(times), 3, -1), 1, 0)
        union = predicted + truth - hit
        iou = np.divide(hit, union, out=np.full_like(hit, np.nan), where=union > 0)
        found.append(np.nanmean(iou[(union > 0).any(1)], axis=1))
    return np.concatenate(found)


def spread(areas: Int64[np.ndarray, "images 3 classes"]) -> tuple[float, float, float]:
    """Lower and upper end of the interval that covers `COVERED` percent, and the standard error."""
    draws = resampled_miou(areas)
    low, high = np.percentile(draws, [50 - COVERED / 2, 50 + COVERED / 2])
    return float(low), float(high), float(draws.std(ddof=1))
