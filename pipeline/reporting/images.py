"""Pictures as data URIs, small enough that a page of them opens at once."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

SMALL = 200  # pixels: up to here a picture is enlarged without smoothing, so that single pixels stay visible
JPEG_QUALITY = 82


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """An embedded image: its data URI, its own size in pixels, and whether it is enlarged pixel by pixel."""

    uri: str
    width: int
    height: int
    crisp: bool


def embed(folder: Path, name: Any, longest: int, *, photograph: bool) -> Picture | None:
    """A picture of `folder`, reduced to `longest` pixels; None where there is no such picture.

    A photograph is stored as JPEG when that is smaller. A label map keeps its exact colours: nearest neighbour and PNG.
    A name that points outside the folder is no such picture.
    """
    if not isinstance(name, str) or not name or Path(name).name != name:
        return None
    try:
        with Image.open(folder / name) as opened:
            image = opened.convert("RGB")
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
    crisp = max(image.size) <= SMALL
    if max(image.size) > longest:
        scale = longest / max(image.size)
        shape = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(shape, Image.Resampling.LANCZOS if photograph else Image.Resampling.NEAREST)
    kind, data = _encode(image, lossy=photograph and not crisp)
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return Picture(uri=uri, width=image.width, height=image.height, crisp=crisp)


def _encode(image: Image.Image, *, lossy: bool) -> tuple[str, bytes]:
    output = io.BytesIO()
    if lossy:
        image.save(output, "JPEG", quality=JPEG_QUALITY, optimize=True)
        return "jpeg", output.getvalue()
    _indexed(image).save(output, "PNG", optimize=True)
    return "png", output.getvalue()


def _indexed(image: Image.Image) -> Image.Image:
    """The same pixels with a palette where at most 256 colours occur (Pillow's own quantizers may shift them)."""
    if image.getcolors(256) is None:
        return image
    pixels = np.asarray(image)
    palette, index = np.unique(pixels.reshape(-1, 3), axis=0, return_inverse=True)
    indexed = Image.fromarray(index.reshape(pixels.shape[:2]).astype(np.uint8))
    indexed.putpalette(palette.astype(np.uint8).tobytes())
    return indexed
