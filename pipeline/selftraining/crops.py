"""Training samples of a student: a random scale, crop and flip of an image and its label map, endless and in order.

Axes: batch, height/width (pixels), side (of a crop).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from pipeline.datasets.pixels import Packed, Pixels
from pipeline.inference import Geometry
from pipeline.interfaces import IMAGENET_MEAN
from pipeline.selftraining.config import CropConfig
from pipeline.training import Loaded

IGNORED = 255
# Salts of the random streams that one seed feeds.
_ORDER, _CROP = 0, 1
# Image and labels of an id, both at the image's size; runs in threads.
Read = Callable[[str], tuple[UInt8[ndarray, "height width 3"], UInt8[ndarray, "height width"]]]


@dataclass(frozen=True, slots=True)
class LabelledBatch:
    """ImageNet-normalised crops and their class ids, 255 where a pixel does not count."""

    pixels: Float[Tensor, "batch 3 side side"]
    labels: UInt8[Tensor, "batch side side"]
    uids: list[str]


def random_crop(
    image: UInt8[ndarray, "height width 3"],
    labels: UInt8[ndarray, "height width"],
    config: CropConfig,
    geometry: Geometry,
    rng: np.random.Generator,
) -> tuple[UInt8[ndarray, "side side 3"], UInt8[ndarray, "side side"]]:
    """A square of the image at a random scale (bilinear, antialiased) with its labels (nearest).

    A scaled image that is smaller than the crop stands somewhere in it, on the mean colour, with ignored labels around.
    Source: GroupViT A.2 (scale in [0.5, 2], crops of 224). Deviates: it does not say what the factor multiplies; here
    the size at which the harness shows the image (its short side at test), so that both see the same scales.
    """
    from PIL import Image

    side, (height, width) = config.size, image.shape[:2]
    factor = rng.uniform(*config.scale)
    tall, wide = (max(1, round(length * factor)) for length in geometry.canvas(height, width))
    top, left = (int(rng.integers(0, max(length - side, 0) + 1)) for length in (tall, wide))
    rows, columns = min(side, tall), min(side, wide)
    down, across = height / tall, width / wide
    box = (left * across, top * down, min((left + columns) * across, width), min((top + rows) * down, height))
    y, x = (int(rng.integers(0, side - length + 1)) for length in (rows, columns))
    pixels = np.empty((side, side, 3), np.uint8)
    pixels[:] = np.rint(255 * np.asarray(IMAGENET_MEAN))
    moved = np.full((side, side), IGNORED, np.uint8)
    place = (slice(y, y + rows), slice(x, x + columns))
    pixels[place] = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.BILINEAR, box))
    moved[place] = np.asarray(Image.fromarray(labels).resize((columns, rows), Image.Resampling.NEAREST, box))
    return (pixels[:, ::-1], moved[:, ::-1]) if rng.random() < config.flip_chance else (pixels, moved)


class CropLoader:
    """Endless batches over `ids`, from any sample on; implements `training.Loader`.

    Order and crops depend on (seed, epoch, image) only, not on threads.
    """

    def __init__(
        self,
        ids: Sequence[str],
        read: Read,
        *,
        crops: CropConfig,
        geometry: Geometry,
        batch_size: int,
        seed: int,
        threads: int,
    ) -> None:
        self._ids, self._read, self._crops, self._geometry = list(ids), read, crops, geometry
        self._batch_size, self._seed, self._threads = batch_size, seed, threads

    def batches(self, position: int) -> Iterator[Loaded]:
        """Batches from the `position`-th drawn sample on; `threads` of them are made ahead."""
        draws, pending = self._draws(position), deque[Future[Loaded]]()
        with ThreadPoolExecutor(max(self._threads, 1), "crops") as pool:
            try:
                while True:
                    while len(pending) <= self._threads:
                        drawn = [next(draws) for _ in range(self._batch_size)]
                        position += self._batch_size
                        pending.append(pool.submit(self._load, drawn, position))
                    yield pending.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _draws(self, position: int) -> Iterator[tuple[int, int]]:
        """(epoch, index of an image) without end: a new permutation every epoch."""
        epoch, skip = divmod(position, len(self._ids))
        while True:
            order = np.random.default_rng([self._seed, epoch, _ORDER]).permutation(len(self._ids))
            yield from ((epoch, int(index)) for index in order[skip:])
            epoch, skip = epoch + 1, 0

    def _load(self, drawn: list[tuple[int, int]], after: int) -> Loaded:
        pairs = []
        for epoch, index in drawn:
            rng = np.random.default_rng([self._seed, epoch, _CROP, index])
            pairs.append(random_crop(*self._read(self._ids[index]), self._crops, self._geometry, rng))
        labels = torch.from_numpy(np.stack([moved for _, moved in pairs]))
        uids = [self._ids[index] for _, index in drawn]
        pixels = Pixels(torch.from_numpy(np.stack([pixels for pixels, _ in pairs])), [None] * len(pairs))
        return Loaded(Packed(LabelledBatch, {"pixels": pixels}, {"labels": labels, "uids": uids}), after)
