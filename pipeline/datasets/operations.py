"""RandAugment's image operations on arrays of bytes: what timm's do to Pillow's images, several times as fast.

Bits, solarised and equalised values are exactly Pillow's; what is computed in floats is within 1. Where pixels move,
the mean difference is below 1: Pillow cuts the fraction of an interpolated value off, OpenCV's warp rounds it and takes
positions to 1/32 pixel. Along the border of the picture, half a pixel is blended with the fill, by Pillow none.

Source: timm's data/auto_augment.py, Pillow's ImageOps and ImageEnhance. Every function returns a new array.

Axes: height, width (pixels), 3 (red, green, blue).
"""

import math

import cv2
import numpy as np
from jaxtyping import UInt8
from numpy import ndarray

from pipeline.interfaces import IMAGENET_MEAN

FILL = tuple(min(255, round(255 * value)) for value in IMAGENET_MEAN)
# Source: Pillow's grey (ITU-R 601-2; the last number is a shift), and its ImageFilter.SMOOTH: ones around a 5.
GREY = np.array([0.299, 0.587, 0.114, 0.0])
SMOOTH_CENTRE, SMOOTH_SUM = 5, 13
# Pillow cuts fractions off where OpenCV rounds to the nearest. Not quite a half: whole numbers stay.
CUT_OFF = -0.49


def auto_contrast(pixels: UInt8[ndarray, "height width 3"]) -> UInt8[ndarray, "height width 3"]:
    """Each colour stretched to [0, 255]; a colour of one value stays."""
    channels = []
    for channel in cv2.split(pixels):
        low, high, _, _ = cv2.minMaxLoc(channel)
        scale, shift = (255 / (high - low), -low) if high > low else (1, 0)
        channels.append(cv2.addWeighted(channel, scale, channel, 0, shift * scale + CUT_OFF))
    return cv2.merge(channels)


def equalize(pixels: UInt8[ndarray, "height width 3"]) -> UInt8[ndarray, "height width 3"]:
    """Each colour's values spread to be equally frequent; a colour of one value stays."""
    found = [cv2.calcHist([pixels], [colour], None, [256], [0, 256]) for colour in range(3)]
    counts = np.concatenate(found, 1).astype(np.int64)
    highest = 255 - (counts[::-1] > 0).argmax(0)
    step = (counts.sum(0) - counts[highest, range(3)]) // 255
    spread = (step // 2 + counts.cumsum(0) - counts) // np.maximum(step, 1)
    tables = np.where(step > 0, spread.clip(max=255), np.arange(256)[:, None])
    return cv2.LUT(pixels, tables[None].astype(np.uint8))


def invert(pixels: UInt8[ndarray, "height width 3"]) -> UInt8[ndarray, "height width 3"]:
    """The negative."""
    return ~pixels


def posterize(pixels: UInt8[ndarray, "height width 3"], bits: int) -> UInt8[ndarray, "height width 3"]:
    """The highest `bits` of each value, 1 to 8."""
    return pixels & np.uint8(256 - (1 << (8 - bits)))


def solarize(pixels: UInt8[ndarray, "height width 3"], threshold: int) -> UInt8[ndarray, "height width 3"]:
    """Values from the threshold on, 0 to 256, turned to their negative."""
    return pixels ^ cv2.threshold(pixels, threshold - 1, 255, cv2.THRESH_BINARY)[1]


def solarize_add(pixels: UInt8[ndarray, "height width 3"], added: int) -> UInt8[ndarray, "height width 3"]:
    """`added`, at most 128, to values below 128."""
    return pixels + (pixels < 128) * np.uint8(added)


def brightness(pixels: UInt8[ndarray, "height width 3"], factor: float) -> UInt8[ndarray, "height width 3"]:
    """Blended with black: 0 is black, 1 the image as it is, more is brighter."""
    return cv2.addWeighted(pixels, factor, pixels, 0, CUT_OFF)


def contrast(pixels: UInt8[ndarray, "height width 3"], factor: float) -> UInt8[ndarray, "height width 3"]:
    """Blended with the image's mean grey, which is 0."""
    mean = int(cv2.mean(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return cv2.addWeighted(pixels, factor, pixels, 0, (1 - factor) * mean + CUT_OFF)


def color(pixels: UInt8[ndarray, "height width 3"], factor: float) -> UInt8[ndarray, "height width 3"]:
    """Blended with the image in grey, which is 0."""
    mixed = factor * np.eye(3, 4) + (1 - factor) * GREY
    mixed[:, 3] = CUT_OFF
    return cv2.transform(pixels, mixed)


def sharpness(pixels: UInt8[ndarray, "height width 3"], factor: float) -> UInt8[ndarray, "height width 3"]:
    """Blended with the smoothed image, which is 0. The outermost pixels stay."""
    centre, around = (SMOOTH_CENTRE - 1) / SMOOTH_SUM, 9 / SMOOTH_SUM  # 9: the box's mean is a ninth of its sum
    weights = factor + (1 - factor) * centre, (1 - factor) * around
    found = cv2.addWeighted(pixels, weights[0], cv2.blur(pixels, (3, 3)), weights[1], CUT_OFF)
    for edge in (0, -1):
        found[edge], found[:, edge] = pixels[edge], pixels[:, edge]
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
    """Moved left by a share of the width, in [-1, 1]."""
    width = pixels.shape[1]
    whole, part = divmod(share * width, 1)
    padded = cv2.copyMakeBorder(pixels, 0, 0, width, width + 1, cv2.BORDER_CONSTANT, value=FILL)
    first = width + int(whole)
    left, right = padded[:, first : first + width], padded[:, first + 1 : first + 1 + width]
    return cv2.addWeighted(left, 1 - part, right, part, CUT_OFF)


def translate_y(pixels: UInt8[ndarray, "height width 3"], share: float) -> UInt8[ndarray, "height width 3"]:
    """Moved up by a share of the height, in [-1, 1]."""
    height = len(pixels)
    whole, part = divmod(share * height, 1)
    padded = cv2.copyMakeBorder(pixels, height, height + 1, 0, 0, cv2.BORDER_CONSTANT, value=FILL)
    first = height + int(whole)
    upper, lower = padded[first : first + height], padded[first + 1 : first + 1 + height]
    return cv2.addWeighted(upper, 1 - part, lower, part, CUT_OFF)


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
