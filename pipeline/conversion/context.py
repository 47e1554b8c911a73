"""PASCAL Context: 59 classes and background from the 459 that were annotated, and the lists of its splits.

Two sources. `trainval_merged.json` is the file of PASCAL in Detail: images with their split (`phase`) and annotations
as compressed run lengths with the raw id of a class; where two overlap the later one counts, as in the Detail API. The
459-class label maps are one MATLAB file per image; their splits are VOC2010's own `ImageSets/Main`.

Source: evaluation card 2.2; the format: the Detail API (Detail.getMask), mmsegmentation's pascal_context.py.
Deviates: the Detail API drops elements from a list while it walks through it, and with them an image or two of a split
(hence 5104 of 5105); here all are kept.
"""

from collections import defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int16, UInt8

from pipeline.artifacts.files import BadInput, atomic_write, read_json
from pipeline.conversion.shapes import image_size, is_finite, rle_mask
from pipeline.conversion.writing import MaskJob, MaskKeys, Written, write_masks
from pipeline.datasets.benchmarks import read_layout
from pipeline.datasets.label_ids import label_table, to_labels
from pipeline.datasets.splits import is_image_id, listed_ids

NAME = "context"
VERSION = 1  # of what the masks hold
MAPS_KEYS = MaskKeys(NAME, "mat", VERSION)
DETAIL_KEYS = MaskKeys(NAME, "detail", VERSION)
RAW_IDS = 460  # 0 and the annotated classes
SPLITS = ("train", "val")
JSON_FILE = "trainval_merged.json"
JSON_REMEDY = "Download it (PASCAL in Detail) into VOCdevkit/VOC2010, or give the 459-class label maps with --mat"
MAT_REMEDY = "Unpack the label maps of PASCAL Context (trainval.tar.gz, one .mat per image) again"


def convert_context(root: Path, label_maps: Path | None, *, bar: bool) -> str:
    """Write SegmentationClassContext and ImageSets/SegmentationContext; the lists come last. Returns a line for people.

    Args:
        label_maps: folder of the 459-class MATLAB files; None to read `trainval_merged.json`.

    Raises:
        BadInput: a file is absent or broken.
    """
    layout = read_layout(NAME)
    folder = root / layout["folder"]
    if not folder.is_dir():
        raise BadInput(folder, "no such folder", "Give the folder that holds VOCdevkit, with VOC2010's trainval in it")
    ids, jobs = _from_detail(folder, layout) if label_maps is None else _from_maps(folder, layout, label_maps)
    written = write_masks(jobs, NAME, bar=bar)
    for split in SPLITS:
        path = folder / layout["lists"].format(split=split)
        atomic_write(path, "".join(f"{image_id}\n" for image_id in sorted(ids[split])))
    return _summary(written, ids, folder)


def raw_table() -> Int16[np.ndarray, " raw"]:
    """The label of each of the annotated ids: 1..59, or 0 for everything else."""
    raw = read_layout(NAME)["raw"]
    return label_table(raw["classes"], 1, raw["background"], 0, RAW_IDS)


def _from_detail(folder: Path, layout: dict[str, Any]) -> tuple[dict[str, list[str]], list[MaskJob]]:
    path = folder / JSON_FILE
    data = read_json(path, JSON_REMEDY)
    annotations: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    ids: dict[str, list[str]] = {split: [] for split in SPLITS}
    jobs: list[MaskJob] = []
    try:
        for annotation in data["annos_segmentation"]:
            annotations[_owner(annotation, path)].append(annotation)
        for image in data["images"]:
            if image["phase"] in ids:
                ids[image["phase"]].append(_image_id(image["file_name"], path))
                jobs.append(_detail_job(image, annotations[_owner(image, path)], path, folder, layout))
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(path, f"not a file of PASCAL in Detail ({error!r})", JSON_REMEDY) from error
    if not jobs:
        raise BadInput(path, "names no image of train or val", JSON_REMEDY)
    return ids, jobs


def _detail_job(
    image: dict[str, Any], annotations: list[dict[str, Any]], path: Path, folder: Path, layout: dict[str, Any]
) -> MaskJob:
    name = _image_id(image["file_name"], path)
    try:
        size = image_size(image)
    except ValueError as error:
        raise BadInput(path, f"image {name} has {error}", JSON_REMEDY) from error
    parts = [(_category(annotation, name, path), annotation["segmentation"]) for annotation in annotations]
    return MaskJob(
        path=folder / layout["masks"].format(id=name),
        key=partial(_parts_key, parts, size, path, name),
        make=partial(_paint, parts, size, path, name),
    )


def _owner(entry: dict[str, Any], path: Path) -> int | str:
    """The id of the image that it is, or belongs to."""
    owner = entry["image_id"]
    if type(owner) not in (int, str):
        what = entry.get("file_name", f"annotation {entry.get('id')!r}")
        raise BadInput(path, f"{what} has image_id {owner!r}", JSON_REMEDY)
    return owner


def _category(annotation: dict[str, Any], name: str, path: Path) -> int:
    category = annotation["category_id"]
    if type(category) is not int or not 0 <= category < RAW_IDS:
        what = f"annotation {annotation.get('id')!r} of {name} has category {category!r}"
        raise BadInput(path, f"{what}: expected a whole number from 0 to {RAW_IDS - 1}", JSON_REMEDY)
    return category


def _paint(
    parts: Iterable[tuple[int, dict[str, Any]]], size: tuple[int, int], path: Path, name: str
) -> UInt8[np.ndarray, "height width"]:
    raw = np.zeros(size, np.int64)
    for category, segmentation in parts:
        try:
            raw[rle_mask(segmentation, *size)] = category
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(path, name, category, error) from error
    return to_labels(raw, raw_table(), f"{path}, image {name}")


def _broken(path: Path, name: str, category: int, error: Exception) -> BadInput:
    return BadInput(path, f"a mask of {name}, class {category}, is broken ({error})", JSON_REMEDY)


def _from_maps(folder: Path, layout: dict[str, Any], maps: Path) -> tuple[dict[str, list[str]], list[MaskJob]]:
    remedy = "Unpack VOC2010's trainval archive, whose lists are the splits of Context"
    ids = {split: listed_ids(folder / "ImageSets" / "Main" / f"{split}.txt", remedy) for split in SPLITS}
    jobs: list[MaskJob] = []
    for name in (name for split in SPLITS for name in ids[split]):
        source = maps / f"{name}.mat"
        if not source.is_file():
            raise BadInput(source, "no such file, but ImageSets/Main lists it", MAT_REMEDY)
        key = partial(MAPS_KEYS.of_file, source)
        jobs.append(MaskJob(path=folder / layout["masks"].format(id=name), key=key, make=partial(_read_map, source)))
    return ids, jobs


def _read_map(path: Path) -> UInt8[np.ndarray, "height width"]:
    from scipy.io import loadmat

    try:
        raw = np.asarray(loadmat(path, variable_names=["LabelMap"])["LabelMap"])
    except Exception as error:  # scipy lets errors of several types out of its parser
        raise BadInput(path, f"no MATLAB file with a LabelMap ({error})", MAT_REMEDY) from error
    if raw.ndim != 2 or raw.dtype.kind not in "iu":
        raise BadInput(path, f"LabelMap is {raw.dtype} of {raw.shape}, not a map of class ids", MAT_REMEDY)
    return to_labels(raw.astype(np.int64), raw_table(), path)


def _parts_key(parts: Iterable[tuple[int, dict[str, Any]]], size: tuple[int, int], path: Path, name: str) -> str:
    try:
        return DETAIL_KEYS.of((*size, parts))
    except ValueError as error:
        category = next(category for category, segmentation in parts if not is_finite(segmentation))
        raise _broken(path, name, category, error) from error


def _image_id(file_name: str, path: Path) -> str:
    name = file_name.removesuffix(".jpg")
    if not is_image_id(name) or "/" in name:
        raise BadInput(path, f"{file_name!r} is no file name of an image", JSON_REMEDY)
    return name


def _summary(written: Written, ids: dict[str, list[str]], folder: Path) -> str:
    counts = ", ".join(f"{len(ids[split]):,} {split}" for split in SPLITS)
    return f"{NAME}: {written} ({counts}; the whole set has 4,996 or 4,998, and 5,104 or 5,105), in {folder}"
