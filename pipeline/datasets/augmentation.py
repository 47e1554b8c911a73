"""RandAugment and random erasing as timm has them, drawn from a sample's own generator.

timm's classes draw from the process's global generators, so that a sample's view would depend on what the other threads
did before. The image operations are timm's own functions; the draws are here.

Source: timm's policy `rand-m9-mstd0.5-inc1` and RandomErasing (pixel mode), which GroupViT and OVSegmentor train with
(cards groupvit.md section 7, ovsegmentor.md section 4).
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32
from numpy import ndarray
from PIL import Image

from pipeline.interfaces import IMAGENET_MEAN
from pipeline.text import wheel

# Source: timm: an operation runs with this chance; its strength is drawn around the magnitude and cut to [0, 10].
CHANCE, MAGNITUDE, DEVIATION, STRONGEST = 0.5, 9.0, 0.5, 10.0
# Source: timm: share of the area, aspect (height / width), attempts to fit a rectangle.
ERASED_SHARE, ERASED_ASPECT, ERASE_ATTEMPTS = (0.02, 1 / 3), (0.3, 1 / 0.3), 10
FILL = tuple(min(255, round(255 * value)) for value in IMAGENET_MEAN)

# Arguments of an operation by its strength in [0, 1] and a sign; timm's "increasing" forms: stronger is further from
# the image as it is.
Arguments = Callable[[float, int], tuple[float, ...]]


def _enhance(strength: float, sign: int) -> tuple[float, ...]:
    return (max(0.1, 1.0 + sign * 0.9 * strength),)


OPERATIONS: dict[str, Arguments] = {
    "AutoContrast": lambda strength, sign: (),
    "Equalize": lambda strength, sign: (),
    "Invert": lambda strength, sign: (),
    "Rotate": lambda strength, sign: (sign * 30.0 * strength,),
    # At least one bit: at full strength timm asks for none, a black picture, which Pillow 13 refuses.
    "PosterizeIncreasing": lambda strength, sign: (max(1, 4 - int(4 * strength)),),
    "SolarizeIncreasing": lambda strength, sign: (256 - min(256, int(256 * strength)),),
    "SolarizeAdd": lambda strength, sign: (min(128, int(110 * strength)),),
    "ColorIncreasing": _enhance,
    "ContrastIncreasing": _enhance,
    "BrightnessIncreasing": _enhance,
    "SharpnessIncreasing": _enhance,
    "ShearX": lambda strength, sign: (sign * 0.3 * strength,),
    "ShearY": lambda strength, sign: (sign * 0.3 * strength,),
    "TranslateXRel": lambda strength, sign: (sign * 0.45 * strength,),
    "TranslateYRel": lambda strength, sign: (sign * 0.45 * strength,),
}


def rand_augment(picture: Image.Image, operations: int, rng: np.random.Generator) -> Image.Image:
    """`operations` drawn operations (with replacement), each with its chance and strength; moved pixels are filled."""
    operation = wheel.module("timm", "data/auto_augment").NAME_TO_OP
    names = list(OPERATIONS)
    for number in rng.integers(len(names), size=operations):
        runs, sign = rng.random() < CHANCE, 1 if rng.random() < 0.5 else -1
        strength = min(max(rng.normal(MAGNITUDE, DEVIATION), 0.0), STRONGEST) / STRONGEST
        if runs:
            name = names[number]
            arguments = OPERATIONS[name](strength, sign)
            picture = operation[name](picture, *arguments, fillcolor=FILL, resample=Image.Resampling.BILINEAR)
    return picture


class Erased(NamedTuple):
    """A rectangle of the view, in pixels, and the normalised values that replace it."""

    top: int
    left: int
    values: Float32[ndarray, "height width 3"]


def draw_erased(side: int, chance: float, rng: np.random.Generator) -> Erased | None:
    """A rectangle of normal noise with that chance; None where there is none or ten draws did not fit."""
    if rng.random() >= chance:
        return None
    for _ in range(ERASE_ATTEMPTS):
        area = rng.uniform(ERASED_SHARE[0], ERASED_SHARE[1]) * side * side
        aspect = math.exp(rng.uniform(math.log(ERASED_ASPECT[0]), math.log(ERASED_ASPECT[1])))
        height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < height < side and 0 < width < side:
            top, left = int(rng.integers(side - height + 1)), int(rng.integers(side - width + 1))
            return Erased(top, left, rng.standard_normal((height, width, 3), dtype=np.float32))
    return None
