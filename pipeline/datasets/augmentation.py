"""RandAugment and random erasing as timm has them, drawn from a sample's own generator.

timm's classes draw from the process's global generators, so that a sample's view would depend on what the other threads
did before. The draws are here, the image operations in `operations`.

Source: timm's policy `rand-m9-mstd0.5-inc1` and RandomErasing (pixel mode), which GroupViT and OVSegmentor train with
(cards groupvit.md section 7, ovsegmentor.md section 4).
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy import ndarray
from torch import Tensor

from pipeline.datasets import operations
from pipeline.datasets.looks import Erased

# Source: timm: an operation runs with this chance; its strength is drawn around the magnitude and cut to [0, 10].
CHANCE, MAGNITUDE, DEVIATION, STRONGEST = 0.5, 9.0, 0.5, 10.0
# Source: timm: share of the area, aspect (height / width), attempts to fit a rectangle.
ERASED_SHARE, ERASED_ASPECT, ERASE_ATTEMPTS = (0.02, 1 / 3), (0.3, 1 / 0.3), 10
# Values of noise, 16 MB: a view of 224 px is erased with a window of up to 50,000 of them.
NOISE = 1 << 22


class Operation(NamedTuple):
    """An image operation, and its arguments by its strength in [0, 1] and a sign.

    timm's "increasing" forms: stronger is further from the image as it is.
    """

    apply: Callable[..., ndarray]
    arguments: Callable[[float, int], tuple[float, ...]]


def _nothing(strength: float, sign: int) -> tuple[float, ...]:
    return ()


def _enhance(strength: float, sign: int) -> tuple[float, ...]:
    return (max(0.1, 1.0 + sign * 0.9 * strength),)


def _posterize(strength: float, sign: int) -> tuple[float, ...]:
    """At least one bit: at full strength timm asks for none, a black picture, which Pillow 13 refuses."""
    return (max(1, 4 - int(4 * strength)),)


def _up_to(most: float) -> Callable[[float, int], tuple[float, ...]]:
    return lambda strength, sign: (sign * most * strength,)


# An operation with its arguments.
Change = tuple[Callable[..., ndarray], tuple[float, ...]]

# By timm's names, in timm's order.
OPERATIONS = {
    "AutoContrast": Operation(operations.auto_contrast, _nothing),
    "Equalize": Operation(operations.equalize, _nothing),
    "Invert": Operation(operations.invert, _nothing),
    "Rotate": Operation(operations.rotate, _up_to(30.0)),
    "PosterizeIncreasing": Operation(operations.posterize, _posterize),
    "SolarizeIncreasing": Operation(operations.solarize, lambda strength, sign: (256 - min(256, int(256 * strength)),)),
    "SolarizeAdd": Operation(operations.solarize_add, lambda strength, sign: (min(128, int(110 * strength)),)),
    "ColorIncreasing": Operation(operations.color, _enhance),
    "ContrastIncreasing": Operation(operations.contrast, _enhance),
    "BrightnessIncreasing": Operation(operations.brightness, _enhance),
    "SharpnessIncreasing": Operation(operations.sharpness, _enhance),
    "ShearX": Operation(operations.shear_x, _up_to(0.3)),
    "ShearY": Operation(operations.shear_y, _up_to(0.3)),
    "TranslateXRel": Operation(operations.translate_x, _up_to(0.45)),
    "TranslateYRel": Operation(operations.translate_y, _up_to(0.45)),
}


def draw_operations(count: int, rng: Random) -> list[Change]:
    """`count` of them (with replacement), less those whose chance did not come; each with its strength."""
    found: list[Change] = []
    for operation in rng.choices(list(OPERATIONS.values()), k=count):
        runs, sign = rng.random() < CHANCE, 1 if rng.random() < 0.5 else -1
        strength = min(max(rng.gauss(MAGNITUDE, DEVIATION), 0.0), STRONGEST) / STRONGEST
        if runs:
            found.append((operation.apply, operation.arguments(strength, sign)))
    return found


def changed(pixels: UInt8[ndarray, "height width 3"], operations: Sequence[Change]) -> UInt8[ndarray, "height width 3"]:
    """What one operation after the other makes of the picture, which itself stays."""
    for apply, arguments in operations:
        pixels = apply(pixels, *arguments)
    return pixels


def draw_erased(side: int, chance: float, rng: Random) -> Erased | None:
    """A rectangle of normal noise with that chance; None where there is none or ten draws did not fit."""
    if not chance or rng.random() >= chance:
        return None
    for _ in range(ERASE_ATTEMPTS):
        area = rng.uniform(ERASED_SHARE[0], ERASED_SHARE[1]) * side * side
        aspect = math.exp(rng.uniform(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < height < side and 0 < width < side:
            top, left = rng.randrange(side - height + 1), rng.randrange(side - width + 1)
            return Erased(top, left, height, width, rng.randrange(NOISE - height * width * 3))
    return None


@cache
def noise(device: torch.device | str) -> Float[Tensor, " values"]:
    """`NOISE` values of a standard normal distribution, the same everywhere; drawn once, for drawing is slow."""
    return torch.from_numpy(np.random.default_rng(0).standard_normal(NOISE, np.float32)).to(device)
