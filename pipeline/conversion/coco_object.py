"""COCO-Object: 80 objects and background, as `<id>_instanceTrainIds.png` beside COCO-Stuff's maps.

By default from the stuff-thing maps of COCO-Stuff, as the papers' code does: what is no object becomes background,
unlabelled pixels too, and nothing is ignored (evaluation card 2.3).

From the instances instead, where the maps are not there: objects are painted by falling `area`, so that small ones stay
visible on larger ones, and by `id` where areas are equal; the area is the annotation's own. Crowd regions are left out,
so that they are background, as in COCO-Stuff's rendering. The papers do not do this, and scores differ slightly.
"""

import math
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int16, UInt8

from pipeline.artifacts.files import BadInput, read_json
from pipeline.conversion.shapes import image_size, is_finite, segmentation_mask
from pipeline.conversion.writing import MaskJob, MaskKeys, write_masks
from pipeline.datasets.benchmarks import read_layout
from pipeline.datasets.label_ids import label_table, read_indices, to_labels
from pipeline.datasets.splits import is_image_id

NAME = "coco_object"
VERSION = 1  # of what the masks hold
MAPS_KEYS = MaskKeys(NAME, "maps", VERSION)
INSTANCES_KEYS = MaskKeys(NAME, "instances", VERSION)
MADE = "TrainIds"  # in the name of a map that is no original
MAPS_REMEDY = "Unpack stuffthingmaps_trainval2017.zip into coco/annotations, or convert with --instances"
JSON_REMEDY = "Unpack annotations_trainval2017.zip into coco again"


def convert_coco_object(root: Path, split: str, *, instances: bool, bar: bool) -> str:
    """Write the masks of a split, such as val2017. Returns a line for people.

    Raises:
        BadInput: a file is absent or broken.
    """
    layout = read_layout(NAME)
    folder = root / layout["folder"]
    if not folder.is_dir():
        raise BadInput(folder, "no such folder", f"Give the folder that holds {layout['folder']}")
    jobs, notes = (_from_instances if instances else _from_maps)(folder, layout, split)
    written = write_masks(jobs, f"{NAME} {split}", bar=bar)
    return f"{NAME} {split}: {written}{notes}, in {folder / 'annotations' / split}"


def raw_table() -> Int16[np.ndarray, " raw"]:
    """The label of each value of a stuff-thing map, which is COCO's category id less 1: 1..80, or 0."""
    raw = read_layout(NAME)["raw"]
    return label_table(raw["classes"], 1, raw["background"], 0)


def _mask_path(folder: Path, layout: dict[str, Any], image_id: str) -> Path:
    return folder / layout["masks"].format(id=image_id)


def _from_maps(folder: Path, layout: dict[str, Any], split: str) -> tuple[list[MaskJob], str]:
    maps = folder / "annotations" / split
    sources = sorted(path for path in maps.glob("*.png") if is_image_id(path.stem) and MADE not in path.name)
    if not sources:
        raise BadInput(maps, "holds no stuff-thing map (<id>.png)", MAPS_REMEDY)
    jobs = [
        MaskJob(
            path=_mask_path(folder, layout, f"{split}/{source.stem}"),
            key=partial(MAPS_KEYS.of_file, source),
            make=partial(_read_map, source),
        )
        for source in sources
    ]
    return jobs, " from stuff-thing maps"


def _read_map(path: Path) -> UInt8[np.ndarray, "height width"]:
    return to_labels(read_indices(path), raw_table(), path)


def _from_instances(folder: Path, layout: dict[str, Any], split: str) -> tuple[list[MaskJob], str]:
    path = folder / "annotations" / f"instances_{split}.json"
    data = read_json(path, JSON_REMEDY)
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    jobs: list[MaskJob] = []
    crowds, table = 0, raw_table()
    try:
        for annotation in data["annotations"]:
            _check_owner(annotation, path)
            crowds += annotation["iscrowd"]
            if not annotation["iscrowd"]:
                found[annotation["image_id"]].append(annotation)
        for image in data["images"]:
            name = image["file_name"].removesuffix(".jpg")
            if not is_image_id(name) or "/" in name:
                raise BadInput(path, f"{image['file_name']!r} is no file name of an image", JSON_REMEDY)
            size = _size(image, path)
            for annotation in found[image["id"]]:
                _check_part(annotation, table, path)
            ordered = sorted(found[image["id"]], key=lambda annotation: (-annotation["area"], annotation["id"]))
            parts = [(part["id"], part["category_id"], part["segmentation"]) for part in ordered]
            jobs.append(
                MaskJob(
                    path=_mask_path(folder, layout, f"{split}/{name}"),
                    key=partial(_parts_key, parts, size, path),
                    make=partial(_paint, parts, size, path),
                )
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(path, f"not COCO's instances ({error!r})", JSON_REMEDY) from error
    if not jobs:
        raise BadInput(path, "names no image", JSON_REMEDY)
    return jobs, f" from instances ({crowds:,} crowd regions left as background)"


def _size(image: dict[str, Any], path: Path) -> tuple[int, int]:
    try:
        if type(image["id"]) is not int:
            raise ValueError(f"the id {image['id']!r}")
        return image_size(image)
    except ValueError as error:
        raise BadInput(path, f"image {image['file_name']} has {error}", JSON_REMEDY) from error


def _check_owner(annotation: dict[str, Any], path: Path) -> None:
    """Refuse what cannot be counted, found again or put in order."""
    for name in ("id", "image_id"):
        if type(annotation[name]) is not int:
            raise BadInput(path, f"annotation {annotation['id']!r} has {name} {annotation[name]!r}", JSON_REMEDY)
    if type(annotation["iscrowd"]) is not int or annotation["iscrowd"] not in (0, 1):
        problem = f"annotation {annotation['id']} has iscrowd {annotation['iscrowd']!r}: expected 0 or 1"
        raise BadInput(path, problem, JSON_REMEDY)


def _check_part(annotation: dict[str, Any], table: Int16[np.ndarray, " raw"], path: Path) -> None:
    """Refuse a category that is no object, and an area that is no number."""
    number, category, area = annotation["id"], annotation["category_id"], annotation["area"]
    if type(category) is not int or not 1 <= category <= len(table) or table[category - 1] < 1:
        raise BadInput(path, f"annotation {number} has category {category!r}, which is no object", JSON_REMEDY)
    if type(area) not in (int, float) or not 0 <= area < math.inf:
        raise BadInput(path, f"annotation {number} has area {area!r}", JSON_REMEDY)


def _paint(parts: list[tuple[int, int, Any]], size: tuple[int, int], path: Path) -> UInt8[np.ndarray, "height width"]:
    table, label = raw_table(), np.zeros(size, np.uint8)
    for number, category, segmentation in parts:
        try:
            label[segmentation_mask(segmentation, *size)] = table[category - 1]
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(path, f"annotation {number} is broken ({error})", JSON_REMEDY) from error
    return label


def _parts_key(parts: list[tuple[int, int, Any]], size: tuple[int, int], path: Path) -> str:
    try:
        return INSTANCES_KEYS.of((*size, parts))
    except ValueError as error:
        number = next(number for number, _, segmentation in parts if not is_finite(segmentation))
        raise BadInput(path, f"annotation {number} is broken ({error})", JSON_REMEDY) from error
