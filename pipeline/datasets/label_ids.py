"""From the values in a mask file to labels: a table per data set, and the checks of what a file holds.

A layout names raw values as spans, `["7-8", "11"]` for 7, 8 and 11. Axes: height and width in pixels; `raw` runs over
the values that a file can hold.
"""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Int16, Integer, UInt8

from pipeline.artifacts.files import BadInput

UNKNOWN = -1
PALETTE_SIZE = 256  # values of an 8-bit file
REMEDY = "Restore it from the original archive"
Color = tuple[int, int, int]
IGNORED: Color = (224, 224, 192)  # Source: VOC's own drawings of its border
VOC_VALUES = (*range(21), 255)


def values(spans: Sequence[str]) -> list[int]:
    """The numbers that spans stand for, in their order."""
    ends = [span.split("-") for span in spans]
    return [value for end in ends for value in range(int(end[0]), int(end[-1]) + 1)]


def label_table(
    classes: Sequence[str], first: int, others: Sequence[str], other: int, size: int = PALETTE_SIZE
) -> Int16[np.ndarray, " raw"]:
    """The label of each raw value: `classes` are numbered from `first`, `others` become `other`, the rest `UNKNOWN`.

    What stands in both is a class.
    """
    table = np.full(size, UNKNOWN, np.int16)
    table[values(others)] = other
    raw = values(classes)
    table[raw] = np.arange(first, first + len(raw))
    return table


def to_labels(
    raw: Integer[np.ndarray, "height width"], table: Int16[np.ndarray, " raw"], path: Path | str
) -> UInt8[np.ndarray, "height width"]:
    """The table's labels.

    Raises:
        BadInput: a value that the table does not know; names `path`.
    """
    beyond = raw[(raw < 0) | (raw >= len(table))]
    wrong = np.unique(beyond if beyond.size else raw[table[raw] == UNKNOWN])
    if wrong.size:
        ids = ", ".join(map(str, wrong[:8]))
        raise BadInput(path, f"holds label ids {ids} outside {_described(table)}", "Check mask and class list")
    return table[raw].astype(np.uint8)


def read_indices(path: Path, *, voc_palette: bool = False) -> UInt8[np.ndarray, "height width"]:
    """The values of an indexed (palette) or plain 8-bit image: never the palette's colours.

    Args:
        voc_palette: the file's palette, where it has one, is VOC's. NOTE: a program that writes a palette anew keeps
            the colours and renumbers the indices, which then are other classes; such a file is refused.

    Raises:
        BadInput: unreadable, or another kind of image.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(path.read_bytes())) as image:
            mode, palette, raw = image.mode, image.getpalette() or [], np.asarray(image)
    except FileNotFoundError:
        raise BadInput(path, "no such file", REMEDY) from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(path, f"not readable as an image ({error})", REMEDY) from error
    if mode not in ("P", "L"):
        remedy = "Write class ids as an indexed (palette) PNG, as SegmentationClass of VOC holds them"
        raise BadInput(path, f"is a {mode} image, not an indexed one", remedy)
    if voc_palette and mode == "P":
        _check_voc_palette(path, palette, np.unique(raw).tolist())
    return raw


def class_color(index: int) -> Color:
    """VOC's colour of a class id; ids beyond one byte repeat.

    Source: VOC development kit, VOClabelcolormap: bit j of each channel's byte, from the top, is bit 3j + channel.
    """
    red = green = blue = 0
    for j in range(8):
        bits = (index % PALETTE_SIZE) >> (3 * j)
        red, green, blue = (v | (bits >> c & 1) << (7 - j) for c, v in enumerate((red, green, blue)))
    return red, green, blue


def _check_voc_palette(path: Path, palette: list[int], used: list[int]) -> None:
    """Refuse a file whose colours are VOC's, each at another index; other palettes say nothing about classes."""
    official = {class_color(index): index for index in VOC_VALUES} | {IGNORED: 255}
    palette = [*palette, *[UNKNOWN] * (3 * PALETTE_SIZE - len(palette))]  # short ones are common
    colors = [(palette[3 * index], palette[3 * index + 1], palette[3 * index + 2]) for index in used]
    meant = [official.get(color, UNKNOWN) for color in colors]
    if UNKNOWN not in meant and len(set(meant)) == len(meant) and meant != used:
        index, label = next(pair for pair in zip(used, meant, strict=True) if pair[0] != pair[1])
        raise BadInput(path, f"its palette was renumbered: index {index} has the colour of label {label}", REMEDY)


def _described(table: Int16[np.ndarray, " raw"]) -> str:
    """The known values as spans: `0..20 or 255`."""
    known = np.flatnonzero(table != UNKNOWN)
    runs = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1)
    texts = [str(run[0]) if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs]
    return " or ".join([", ".join(texts[:-1]), texts[-1]] if len(texts) > 1 else texts)
