"""Masks from COCO's annotation formats: run lengths, also as compressed text, and polygons.

Axes: height and width in pixels. A mask is True inside.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from pipeline.artifacts.shards import MAX_PIXELS

FAR = 1e9  # pixels; a corner beyond is a mistake, and its edges would leave float64
_ZERO, _BITS, _MORE, _SIGN = 48, 5, 0x20, 0x10  # of a character of compressed counts


def image_size(image: Mapping[str, Any]) -> tuple[int, int]:
    """Height and width that an image's entry states, in pixels.

    Raises:
        ValueError: not whole numbers above 0, or more than MAX_PIXELS pixels.
        KeyError: not stated.
    """
    height, width = image["height"], image["width"]
    if not (type(height) is type(width) is int and height > 0 < width and height * width <= MAX_PIXELS):
        raise ValueError(f"a size of {height!r} x {width!r} pixels")
    return height, width


def is_finite(segmentation: Any) -> bool:
    """Whether no number in it is infinite or NaN."""
    try:
        json.dumps(segmentation, allow_nan=False)
    except ValueError:
        return False
    return True


def rle_mask(rle: Mapping[str, Any], height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """The mask of run lengths, off first, down the columns. Source: COCO's format (MaskApi).

    Raises:
        ValueError: of another size, or runs that do not fill it.
    """
    if list(rle["size"]) != [height, width]:
        raise ValueError(f"a mask of {rle['size']} for an image of {[height, width]}")
    counts, pixels = rle["counts"], height * width
    wrong = f"run lengths that do not add up to {height} x {width} pixels"
    if not isinstance(counts, str) and not all(type(run) is int and 0 <= run <= pixels for run in counts):
        raise ValueError(wrong)
    runs = decode_counts(counts) if isinstance(counts, str) else np.array(counts, np.int64)
    if (runs < 0).any() or (runs > pixels).any() or runs.sum() != pixels:
        raise ValueError(wrong)
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def decode_counts(text: str) -> Int64[np.ndarray, " runs"]:
    """Run lengths of COCO's compressed text.

    A number is a little-endian run of characters with 5 bits each, from "0" on, whose sixth bit says that more follow
    and whose fifth, in the last one, is the sign. From the fourth number on it is the difference to the last but one.
    Source: MaskApi, rleFrString.

    Raises:
        ValueError: other characters, or cut off inside a number.
    """
    codes = np.array([ord(character) for character in text], np.int64) - _ZERO
    if not len(codes) or (codes < 0).any() or (codes >= 2 * _MORE).any() or codes[-1] & _MORE:
        raise ValueError("no compressed run lengths")
    last = np.flatnonzero((codes & _MORE) == 0)
    starts = np.concatenate([[0], last[:-1] + 1])
    lengths = last - starts + 1
    if lengths.max() > 8:  # longer numbers would not fit into 64 bits, nor any image
        raise ValueError("no compressed run lengths")
    shifts = _BITS * (np.arange(len(codes)) - np.repeat(starts, lengths))
    runs = np.add.reduceat((codes & (_MORE - 1)) << shifts, starts)
    runs -= np.where(codes[last] & _SIGN, np.int64(1) << (_BITS * lengths), 0)
    runs[1::2] = runs[1::2].cumsum()
    runs[2::2] = runs[2::2].cumsum()
    return runs


def polygon_mask(corners: Sequence[Any], height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """True where a pixel's centre lies inside the polygon x0, y0, x1, y1, ... by the even-odd rule.

    Deviates: COCO's own tool rounds the corners to fifths of a pixel first, so that pixels at the outline can differ.

    Raises:
        ValueError: fewer than three corners, or a corner that is no number or beyond `FAR`.
    """
    if len(corners) < 6 or len(corners) % 2:
        raise ValueError("a polygon without three corners")
    if not all(type(corner) in (int, float) and abs(corner) <= FAR for corner in corners):
        raise ValueError(f"a polygon with a corner that is no number up to {FAR:g}")
    points = np.array(corners, np.float64)
    # Below a crossing of a column's centre line the side changes; an edge owns its left end and not its right one.
    toggles = np.zeros((height + 1, width), bool)
    points = points.reshape(-1, 2)
    for one, two in zip(points, np.roll(points, -1, axis=0), strict=True):
        (left, y_left), (right, y_right) = (one, two) if one[0] <= two[0] else (two, one)
        first, end = (min(max(int(np.ceil(x - 0.5)), 0), width) for x in (left, right))
        if first < end:
            columns = np.arange(first, end)
            y = y_left + (y_right - y_left) * ((columns + 0.5 - left) / (right - left))
            toggles[np.clip(np.ceil(y - 0.5), 0, height).astype(np.int64), columns] ^= True
    return np.logical_xor.accumulate(toggles[:height], axis=0)


def segmentation_mask(segmentation: Any, height: int, width: int) -> Bool[np.ndarray, "height width"]:
    """An annotation's mask: run lengths, or the union of its polygons.

    Raises:
        ValueError, TypeError, KeyError: neither of them, or a broken one.
    """
    if isinstance(segmentation, Mapping):
        return rle_mask(segmentation, height, width)
    mask = np.zeros((height, width), bool)
    for corners in segmentation:
        mask |= polygon_mask(corners, height, width)
    return mask
