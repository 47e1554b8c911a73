"""Views on their way to the training step: bytes until they are on its device, where they are normalised.

A batch is a quarter as large that way when it leaves a worker process and when it is copied to a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from pipeline.datasets.augmentation import noise
from pipeline.datasets.looks import Erased
from pipeline.datasets.transforms import normalise
from pipeline.interfaces import moved

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class Pixels:
    """A batch of views as bytes, and the rectangle of each that noise replaces after they are normalised."""

    images: UInt8[Tensor, "batch side side 3"]
    erased: list[Erased | None]

    def to(self, device: torch.device | str) -> Float[Tensor, "batch 3 side side"]:
        """ImageNet-normalised pixels, the channels last in memory, which convolutions on a CPU prefer."""
        pixels = normalise(self.images.to(device, non_blocking=True))
        for image, box in zip(pixels, self.erased, strict=True):
            if box is not None:
                values = noise(device)[box.first : box.first + box.height * box.width * 3]
                window = image[box.top : box.top + box.height, box.left : box.left + box.width]
                window.copy_(values.view(window.shape))
        return pixels.permute(0, 3, 1, 2)


@dataclass(frozen=True, slots=True)
class Packed(Generic[Batch]):
    """What `to(device)` makes a batch of.

    Attributes:
        make: the batch's class.
        pixels: its fields that hold pixels.
        others: all its other fields; tensors among them are moved.
    """

    make: Callable[..., Batch]
    pixels: dict[str, Pixels]
    others: dict[str, Any]

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`."""
        others = {name: moved(value, device) for name, value in self.others.items()}
        return self.make(**{name: pixels.to(device) for name, pixels in self.pixels.items()}, **others)
