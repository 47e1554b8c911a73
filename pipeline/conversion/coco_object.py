"""COCO-Object: 80 objects and background, as `<id>_instanceTrainIds.png` beside COCO-Stuff's maps.

By default from the stuff-thing maps of COCO-Stuff, as the papers' code does: what is no object becomes background,
unlabelled pixels too, and nothing is ignored (evaluation card 2.3).

From the instances instead, where the maps are not there: objects are painted by falling `area`, so that small ones stay
visible on larger ones, and by `id` where areas are equal; the area is the annotation's own. Crowd regions are left out,
so that they are background, as in COCO-Stuff's rendering. The papers do not do this, and scores differ slightly.
"""

from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int16, UInt8

from pipeline.artifacts.files import BadInput, digest, read_json, sha256_file
from pipeline.conversion.shapes import segmentation_mask
from pipeline.conversion.writing import MaskJob, write_masks
from pipeline.datasets.benchmarks import read_layout
from pipeline.datasets.label_ids import UNKNOWN, label_table, read_indices, to_labels
from pipeline.datasets.splits import is_image_id

NAME = "coco_object"
VERSION = 1  # of what the masks hold
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
            key=partial(_file_key, source),
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
    found: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    jobs: list[MaskJob] = []
    crowds = 0
    try:
        for annotation in data["annotations"]:
            crowds += bool(annotation["iscrowd"])
            if not annotation["iscrowd"]:
                found[annotation["image_id"]].append(annotation)
        for image in data["images"]:
            name = image["file_name"].removesuffix(".jpg")
            if not is_image_id(name) or "/" in name:
                raise BadInput(path, f"{image['file_name']!r} is no file name of an image", JSON_REMEDY)
            size = int(image["height"]), int(image["width"])
            ordered = sorted(found[image["id"]], key=lambda annotation: (-annotation["area"], annotation["id"]))
            parts = [(part["id"], part["category_id"], part["segmentation"]) for part in ordered]
            jobs.append(
                MaskJob(
                    path=_mask_path(folder, layout, f"{split}/{name}"),
                    key=partial(_key, "instances", (*size, parts)),
                    make=partial(_paint, parts, size, path),
                )
            )
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(path, f"not COCO's instances ({error!r})", JSON_REMEDY) from error
    if not jobs:
        raise BadInput(path, "names no image", JSON_REMEDY)
    return jobs, f" from instances ({crowds:,} crowd regions left as background)"


def _paint(parts: list[tuple[int, int, Any]], size: tuple[int, int], path: Path) -> UInt8[np.ndarray, "height width"]:
    table, label = raw_table(), np.zeros(size, np.uint8)
    for number, category, segmentation in parts:
        value = table[category - 1] if 1 <= category <= len(table) else UNKNOWN
        if value < 1:
            raise BadInput(path, f"annotation {number} has category {category}, which is no object", JSON_REMEDY)
        try:
            label[segmentation_mask(segmentation, *size)] = value
        except (KeyError, TypeError, ValueError) as error:
            raise BadInput(path, f"annotation {number} is broken ({error})", JSON_REMEDY) from error
    return label


def _key(source: str, value: Any) -> str:
    return digest([NAME, source, VERSION, value])


def _file_key(path: Path) -> str:
    return _key("maps", sha256_file(path))
