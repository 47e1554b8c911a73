"""Label maps as pictures: an overlay with a legend, and the raw map.

The raw map is an indexed PNG: 0 is background, i the i-th label; 16 bits when there are more than 255 labels.
"""

import io

import numpy as np
from jaxtyping import Int64, UInt8
from PIL import Image, ImageDraw, ImageFont

from pipeline.datasets.label_ids import PALETTE_SIZE, class_color

OPACITY = 0.6  # of a label's colour over the photograph
TEXT_PX = 16  # legend: height of a letter; a row is twice as high
BACKGROUND = "background"
SHOWN_LABELS = 24  # most labels in a legend, the largest areas first


def overlay(
    image: UInt8[np.ndarray, "height width 3"], labels: Int64[np.ndarray, "height width"], names: tuple[str, ...]
) -> Image.Image:
    """The photograph under its labels' colours, with a legend of the labels found below it."""
    colors = np.array([class_color(index) for index in range(PALETTE_SIZE)])[labels % PALETTE_SIZE]
    mixed = np.where((labels > 0)[..., None], (1 - OPACITY) * image + OPACITY * colors, image).round().astype(np.uint8)
    rows = found(labels, names)[:SHOWN_LABELS]
    font = ImageFont.load_default(size=TEXT_PX)
    texts = [f"{name}  {100 * share:.1f} %" for name, share in rows]
    width = max([mixed.shape[1], *(int(font.getlength(text)) + 4 * TEXT_PX for text in texts)])
    page = Image.new("RGB", (width, mixed.shape[0] + 2 * TEXT_PX * len(rows)), "white")
    page.paste(Image.fromarray(mixed), (0, 0))
    pen = ImageDraw.Draw(page)
    for row, ((name, _), text) in enumerate(zip(rows, texts, strict=True)):
        top = mixed.shape[0] + 2 * TEXT_PX * row + TEXT_PX // 2
        color = "white" if name == BACKGROUND else class_color((names.index(name) + 1) % PALETTE_SIZE)
        pen.rectangle((TEXT_PX, top, 2 * TEXT_PX, top + TEXT_PX), fill=color, outline="black")
        pen.text((3 * TEXT_PX, top - TEXT_PX // 6), text, fill="black", font=font)
    return page


def found(labels: Int64[np.ndarray, "height width"], names: tuple[str, ...]) -> list[tuple[str, float]]:
    """Labels that occur with their share of the pixels, the largest first; 0 is background."""
    counts = np.bincount(labels.ravel(), minlength=len(names) + 1)
    order = sorted(np.flatnonzero(counts), key=lambda index: (-counts[index], index))
    return [((BACKGROUND, *names)[index], counts[index] / labels.size) for index in order]


def label_png(labels: Int64[np.ndarray, "height width"], num_labels: int) -> bytes:
    """The ids as an indexed PNG in the overlay's colours, or as 16-bit grey above 255 labels."""
    if num_labels >= PALETTE_SIZE:
        return png_bytes(Image.fromarray(labels.astype(np.uint16)))
    image = Image.fromarray(labels.astype(np.uint8))
    image.putpalette([channel for index in range(PALETTE_SIZE) for channel in class_color(index)])
    return png_bytes(image)


def png_bytes(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    output = io.BytesIO()
    image.save(output, "PNG")
    return output.getvalue()
