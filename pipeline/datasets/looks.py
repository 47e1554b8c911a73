"""A batch before any of its images is read: what is shown of which, and what stands beside it.

All that is random is drawn from the shards' tables alone. So the draws of a batch run one after the other, and then its
images are read, decoded and painted one after the other, straight into the batch's memory. Python code that takes turns
with a decoder is pushed out of a core's caches each time, and runs at a third of its speed (reports/log.md).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import UInt8
from numpy import ndarray

from pipeline.datasets.images import StoredImage

# Paints its second argument with a view of its first; returns it.
Paint = Callable[[UInt8[ndarray, "height width 3"], UInt8[ndarray, "side side 3"]], UInt8[ndarray, "side side 3"]]


class Erased(NamedTuple):
    """A rectangle of the view, in pixels, and where in `noise` the values begin that replace it once normalised."""

    top: int
    left: int
    height: int
    width: int
    first: int


class Look(NamedTuple):
    """What is shown of an image: a square of `side` px, as `paint` has it."""

    image: StoredImage
    side: int
    paint: Paint
    erased: Erased | None = None


class Drawn(NamedTuple):
    """What a transform makes of a sample.

    `looks`: by the name under which `Collate` gets the pixels; every sample of a batch has the same names and sides.
    `item`: all the rest.
    """

    item: Any
    looks: dict[str, Look]
