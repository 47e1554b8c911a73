"""The scored splits in VOC's own layout: palette masks with a 255 border, listed under ImageSets/Segmentation.

`train.txt` lists the tune split, on which thresholds are chosen, `val.txt` the val split, on which methods compare.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.artifacts.files import CorruptPayload, atomic_json, atomic_write
from pipeline.sources.scenes.classes import CLASSES, STUFF
from pipeline.sources.scenes.scene import BORDER, Scene

ROOT = Path("VOCdevkit/VOC2012")
LISTS = {"tune": "train.txt", "val": "val.txt"}


def colour_map() -> np.ndarray:
    """VOC's palette, uint8 [256, 3]. Source: VOC devkit, VOClabelcolormap.m: bits of the label, from the top."""
    labels = np.arange(256)
    palette = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            palette[:, channel] |= ((labels >> (3 * bit + channel) & 1) << (7 - bit)).astype(np.uint8)
    return palette


def write_voc(
    folder: Path, counts: dict[str, int], draw: Callable[[str, int], Scene], encode: Callable[[np.ndarray], bytes]
) -> None:
    """Writes `counts[split]` scenes per split of `LISTS`, and classes.json.

    Args:
        draw: the scene of a split and index.
        encode: JPEG bytes of an RGB image.
    """
    root, palette = folder / ROOT, colour_map().tobytes()
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for split, file in LISTS.items():
        names = [f"{split}_{index:06d}" for index in range(counts[split])]
        for index, name in enumerate(names):
            scene = draw(split, index)
            (root / "JPEGImages" / f"{name}.jpg").write_bytes(encode(scene.image))
            mask = Image.fromarray(scene.label)
            mask.putpalette(palette)
            mask.save(root / "SegmentationClass" / f"{name}.png", optimize=True)
        atomic_write(root / "ImageSets/Segmentation" / file, "".join(f"{name}\n" for name in names))
    atomic_json(folder / "classes.json", {"classes": list(CLASSES), "background": True, "stuff": list(STUFF)})


def check_voc(folder: Path) -> int:
    """Reads everything back; the number of image and mask pairs.

    Raises:
        CorruptPayload: an image without its mask, another size, a label that is no class.
    """
    root, total = folder / ROOT, 0
    known = {*range(len(CLASSES)), BORDER}
    for file in LISTS.values():
        for name in (root / "ImageSets/Segmentation" / file).read_text().split():
            path = root / "SegmentationClass" / f"{name}.png"
            with Image.open(path) as mask, Image.open(root / "JPEGImages" / f"{name}.jpg") as image:
                if mask.mode != "P" or mask.size != image.size:
                    raise CorruptPayload(path, f"a {mask.mode} mask of {mask.size} for an image of {image.size}")
                found = set(np.unique(np.asarray(mask)).tolist())
            if not found <= known:
                raise CorruptPayload(path, f"labels {sorted(found - known)} are no classes")
            total += 1
    if json.loads((folder / "classes.json").read_text())["classes"] != list(CLASSES):
        raise CorruptPayload(folder / "classes.json", "other classes than were drawn")
    return total
