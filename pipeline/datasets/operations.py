"""RandAugment's image operations on arrays of bytes: what timm's do to Pillow's images, several times as fast.

Operations on single values are exactly Pillow's; `color` and `sharpness` are within 1. Where pixels move, the mean
difference is below 1: Pillow cuts the fraction of an interpolated value off, OpenCV rounds it and takes positions to
1/32 pixel. Along the border of the picture, OpenCV blends half a pixel with the fill, Pillow does not.

Source: timm's data/auto_augment.py, Pillow's ImageOps and ImageEnhance. Every function returns a new array.

Axes: height, width (pixels), 3 (red, green, blue).
"""

import math

import cv2
import numpy as np
from jaxtyping import Float32, Num, UInt8
from numpy import ndarray

from pipeline.interfaces import IMAGENET_MEAN

FILL = tuple(min(255, round(255 * value)) for value in IMAGENET_MEAN)
# Source: Pillow's conversion to grey (ITU-R 601-2), and its ImageFilter.SMOOTH: ones around a 5.
GREY = np.array([0.299, 0.587, 0.114])
SMOOTH_CENTRE, SMOOTH_SUM = 5, 13
# Pillow cuts a blend's fraction off where OpenCV rounds to the nearest.
CUT_OFF = -0.5

_VALUES = np.arange(256)


def auto_contrast(pixels: UInt8[ndarray, "height width 3"]) -> UInt8[ndarray, "height width 3"]:
    """Each colour stretched to [0, 255]; a colour of one value stays."""
    tables = []
    for channel in cv2.split(pixels):
        low, high, _, _ = cv2.minMaxLoc(channel)
        scale = 255 / max(high - low, 1)
        tables.append(_VALUES * scale - low * scale if high > low else _VALUES)
    return _look_up(pixels, *tables)


def equalize(pixels: UInt8[ndarray, "height width 3"]) -> UInt8[ndarray, "height width 3"]:
    """Each colour's values spread to be equally frequent; a colour of one value stays."""
    tables = []
    for channel in range(3):
        counts = cv2.calcHist([pixels], [channel], None, [256], [0, 256])[:, 0].astype(np.int64)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        tables.append((step // 2 + counts.cumsum() - counts) // step if step else _VALUES)
    return _look_up(pixels, *tables)


def invert(pixels: UInt8[ndarray, "height width 3"]) -> UInt8[ndarray, "height width 3"]:
    """The negative."""
    return 255 - pixels


def posterize(pixels: UInt8[ndarray, "height width 3"], bits: int) -> UInt8[ndarray, "height width 3"]:
    """The highest `bits` of each value, 1 to 8."""
    return pixels & np.uint8(256 - (1 << (8 - bits)))


def solarize(pixels: UInt8[ndarray, "height width 3"], threshold: int) -> UInt8[ndarray, "height width 3"]:
    """Values from the threshold on turned to their negative."""
    return _look_up(pixels, np.where(_VALUES < threshold, _VALUES, 255 - _VALUES))


def solarize_add(pixels: UInt8[ndarray, "height width 3"], added: int) -> UInt8[ndarray, "height width 3"]:
    """`added` to values below 128."""
    return _look_up(pixels, np.where(_VALUES < 128, _VALUES + added, _VALUES))


def brightness(pixels: UInt8[ndarray, "height width 3"], factor: float) -> UInt8[ndarray, "height width 3"]:
    """Blended with black: 0 is black, 1 the image as it is, more is brighter."""
    return _look_up(pixels, _blended(0, factor))


def contrast(pixels: UInt8[ndarray, "height width 3"], factor: float) -> UInt8[ndarray, "height width 3"]:
    """Blended with the image's mean grey, which is 0."""
    mean = int(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _look_up(pixels, _blended(mean, factor))


def color(pixels: UInt8[ndarray, "height width 3"], factor: float) -> UInt8[ndarray, "height width 3"]:
    """Blended with the image in grey, which is 0."""
    mixed = factor * np.eye(3) + (1 - factor) * GREY
    return cv2.transform(pixels, np.hstack([mixed, np.full((3, 1), CUT_OFF)]))


def sharpness(pixels: UInt8[ndarray, "height width 3"], factor: float) -> UInt8[ndarray, "height width 3"]:
    """Blended with the smoothed image, which is 0. The outermost pixels stay."""
    centre, around = (SMOOTH_CENTRE - 1) / SMOOTH_SUM, 9 / SMOOTH_SUM  # 9: the box's mean is a ninth of its sum
    weights = factor + (1 - factor) * centre, (1 - factor) * around
    found = cv2.addWeighted(pixels, weights[0], cv2.blur(pixels, (3, 3)), weights[1], CUT_OFF)
    found[[0, -1]], found[:, [0, -1]] = pixels[[0, -1]], pixels[:, [0, -1]]
    return found


def rotate(pixels: UInt8[ndarray, "height width 3"], degrees: float) -> UInt8[ndarray, "height width 3"]:
    """Counterclockwise about the centre."""
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = pixels.shape[1] / 2, pixels.shape[0] / 2
    across = (cosine, -sine, x - cosine * x + sine * y)
    return _move(pixels, across, (sine, cosine, y - sine * x - cosine * y))


def shear_x(pixels: UInt8[ndarray, "height width 3"], factor: float) -> UInt8[ndarray, "height width 3"]:
    """Each row moved left by `factor` of its distance from the top."""
    return _move(pixels, (1, factor, 0), (0, 1, 0))


def shear_y(pixels: UInt8[ndarray, "height width 3"], factor: float) -> UInt8[ndarray, "height width 3"]:
    """Each column moved up by `factor` of its distance from the left."""
    return _move(pixels, (1, 0, 0), (factor, 1, 0))


def translate_x(pixels: UInt8[ndarray, "height width 3"], share: float) -> UInt8[ndarray, "height width 3"]:
    """Moved left by a share of the width."""
    return _move(pixels, (1, 0, share * pixels.shape[1]), (0, 1, 0))


def translate_y(pixels: UInt8[ndarray, "height width 3"], share: float) -> UInt8[ndarray, "height width 3"]:
    """Moved up by a share of the height."""
    return _move(pixels, (1, 0, 0), (0, 1, share * pixels.shape[0]))


def _blended(grey: int, factor: float) -> Float32[ndarray, "256"]:
    """All values blended with one grey, as Pillow does: in float32."""
    return np.float32(grey) + np.float32(factor) * (_VALUES - grey).astype(np.float32)


def _look_up(
    pixels: UInt8[ndarray, "height width 3"], *tables: Num[ndarray, "256"]
) -> UInt8[ndarray, "height width 3"]:
    """Values replaced by a table's, one for all colours or one each; cut to [0, 255], fractions cut off."""
    return cv2.LUT(pixels, np.stack(tables, -1).clip(0, 255).astype(np.uint8)[None])


def _move(
    pixels: UInt8[ndarray, "height width 3"],
    across: tuple[float, float, float],
    down: tuple[float, float, float],
) -> UInt8[ndarray, "height width 3"]:
    """What lies at (`across` . (x, y, 1), `down` . (x, y, 1)) of the image, bilinear; FILL from outside of it.

    x and y in pixels from the image's corner, as Pillow counts, so that the first pixel's centre is at 0.5.
    """
    centred = [(a, b, c + (a + b - 1) / 2) for a, b, c in (across, down)]
    return cv2.warpAffine(
        pixels,
        np.array(centred),
        (pixels.shape[1], pixels.shape[0]),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=FILL,
    )
