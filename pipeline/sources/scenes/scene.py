"""What a scene is, and what is asked of one."""

from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import numpy as np
from jaxtyping import UInt8

from pipeline.params import Range

BORDER = 255
SPLITS = {"train": 0, "tune": 1, "val": 2}


@dataclass(frozen=True, kw_only=True, slots=True)
class SceneConfig:
    """What decides a scene's pixels and words. Shares are probabilities in [0, 1]."""

    image_size: Annotated[int, Range(32, 256)]
    variant: Literal["easy", "hard"]
    named: Annotated[float, Range(0, 1)]
    unrelated: Annotated[float, Range(0, 1)]
    duplicate: Annotated[float, Range(0, 1)]


class Placed(NamedTuple):
    """An object of a scene. `visible` is the share of its own pixels that nothing covers, in [0, 1]."""

    name: str
    colour: str
    radius: float  # pixels
    centre: tuple[float, float]  # x, y in pixels
    visible: float


class Scene(NamedTuple):
    image: UInt8[np.ndarray, "size size 3"]
    label: UInt8[np.ndarray, "size size"]
    caption: str
    objects: tuple[Placed, ...]
    stuff: tuple[str, ...]
