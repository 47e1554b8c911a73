"""Published annotations by hand: run lengths, polygons, PASCAL in Detail's file and COCO's instances."""

import json
from pathlib import Path

import numpy as np
from PIL import Image


def encode(mask: np.ndarray) -> dict:
    """COCO's compressed run lengths, a character at a time. Source: MaskApi, rleToString."""
    runs, value, length = [], False, 0
    for pixel in mask.T.flatten():
        if pixel != value:
            runs.append(length)
            value, length = pixel, 0
        length += 1
    runs.append(length)
    text = ""
    for index, run in enumerate(runs):
        number, more = run - (runs[index - 2] if index > 2 else 0), True
        while more:
            low, number = number & 0x1F, number >> 5
            more = number != (-1 if low & 0x10 else 0)
            text += chr((low | (0x20 if more else 0)) + 48)
    return {"size": list(mask.shape), "counts": text}


def plain_polygon(corners: list[float], height: int, width: int) -> np.ndarray:
    """Even-odd at the pixels' centres, edge by edge over the whole image: a ray upwards from each centre."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    inside = np.zeros((height, width), bool)
    points = list(zip(corners[0::2], corners[1::2], strict=True))
    for one, two in zip(points, points[1:] + points[:1], strict=True):
        (left, y_left), (right, y_right) = sorted((one, two), key=lambda point: point[0])
        if left < right:
            inside ^= (left <= x) & (x < right) & (y_left + (y_right - y_left) * ((x - left) / (right - left)) <= y)
    return inside


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


def detail_file(root: Path) -> Path:
    """PASCAL in Detail's file with an image per split: grass under a dog under something that is no class."""
    folder = root / "VOCdevkit/VOC2010"
    folder.mkdir(parents=True)
    full, low, dot = np.ones((3, 4), bool), np.zeros((3, 4), bool), np.zeros((3, 4), bool)
    low[1:], dot[2, 3] = True, True
    annotations = [
        {"id": 1, "image_id": 2008000002, "category_id": 187, "segmentation": encode(full)},
        {"id": 2, "image_id": 2008000003, "category_id": 458, "segmentation": encode(low)},
        {"id": 3, "image_id": 2008000002, "category_id": 113, "segmentation": encode(low)},
        {"id": 4, "image_id": 2008000002, "category_id": 1, "segmentation": encode(dot)},
    ]
    images = [
        {"image_id": 2008000000 + index, "file_name": f"2008_{index:06d}.jpg", "height": 3, "width": 4, "phase": phase}
        for index, phase in ((7, "val"), (2, "val"), (3, "train"), (9, "test"))
    ]
    path = folder / "trainval_merged.json"
    path.write_text(json.dumps({"images": images, "annos_segmentation": annotations, "categories": []}))
    return path


def edit(path: Path, **changes) -> None:
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **changes}))


def square(left: int, top: int, side: int) -> list[list[float]]:
    return [[left, top, left + side, top, left + side, top + side, left, top + side]]


def instances_file(root: Path) -> Path:
    """A dog of 16 pixels with a smaller cup on it, two that tie, a crowd, and a picture of nothing."""
    path = root / "coco/annotations/instances_val2017.json"
    path.parent.mkdir(parents=True)
    crowd = {"size": [6, 6], "counts": [0, 36]}
    annotations = [
        {"id": 5, "image_id": 139, "category_id": 47, "area": 4, "iscrowd": 0, "segmentation": square(1, 1, 2)},
        {"id": 6, "image_id": 139, "category_id": 18, "area": 16, "iscrowd": 0, "segmentation": square(0, 0, 4)},
        {"id": 8, "image_id": 139, "category_id": 90, "area": 2, "iscrowd": 0, "segmentation": square(4, 4, 2)},
        {"id": 7, "image_id": 139, "category_id": 1, "area": 2, "iscrowd": 0, "segmentation": square(4, 4, 2)},
        {"id": 9, "image_id": 139, "category_id": 1, "area": 1, "iscrowd": 1, "segmentation": crowd},
    ]
    images = [
        {"id": image, "file_name": f"{image:012d}.jpg", "height": 6, "width": 6 - (image == 285)}
        for image in (285, 139)
    ]
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return path
