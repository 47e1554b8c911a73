"""Benchmarks in their official on-disk layouts: RGB image, class-id mask, class list.

A benchmark is a data file, `classes/<name>.json`: layout, splits, names per protocol, raw ids of the classes,
background words. Without background (VOC20, Context59, COCO-80) label 0 is ignored and the classes count from 0;
source: evaluation card section 8. Reading checks every file that a split names before the first image is scored.

Axes: height and width in pixels of the stored image; predictions are resized to it, masks never are.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from pipeline.artifacts.files import BadInput, read_json
from pipeline.artifacts.shards import decode_rgb
from pipeline.datasets.label_ids import REMEDY, label_table, read_indices, to_labels, values
from pipeline.datasets.splits import NO_IMAGE, listed_ids, matching_ids

Protocol = Literal["native", "unified"]
Split = Literal["tune", "test"]
IMAGES_AT_ONCE = 32  # whose windows a model may read together
BYTES_AT_ONCE = 16 << 20  # of their pixels as stored
_FOLDER = resources.files("pipeline.datasets") / "classes"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One image of a split; label ids are 0..num_classes-1 or the ignore index."""

    id: str
    image: UInt8[np.ndarray, "height width 3"]
    label: UInt8[np.ndarray, "height width"]


def names() -> list[str]:
    """Every benchmark with a data file."""
    return sorted(entry.name.removesuffix(".json") for entry in _FOLDER.iterdir() if entry.name.endswith(".json"))


def check_class_names(class_names: Sequence[Any], where: str) -> tuple[str, ...]:
    """The names, stripped.

    Raises:
        ValueError: none, an empty one, or two that differ only in case or spaces; names `where` and the position.
    """
    cleaned = [name.strip() if isinstance(name, str) else name for name in class_names]
    for position, name in enumerate(cleaned, start=1):
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}: class {position} of {len(cleaned)} is empty or no text: {name!r}")
    folded = [" ".join(name.split()).casefold() for name in cleaned]
    for position, name in enumerate(folded):
        if name in folded[:position]:
            raise ValueError(f"{where}: class {cleaned[position]!r} stands twice")
    if not cleaned:
        raise ValueError(f"{where}: no classes")
    return tuple(cleaned)


@dataclass(frozen=True, kw_only=True, slots=True)
class Benchmark:
    """One benchmark under one root and protocol.

    Attributes:
        classes: names by label id, the background's included where `has_background`.
        stuff: words for what is no class, which the extra-vocabulary rule maps to background.
        labels: label of each raw value of a mask file (0..255), the ignore index for what does not count.
        test_sizes: sizes that the whole test split may have, the usual one first; none where it is not fixed.
        layout: the data file. `images` and `masks` are paths below `folder` with the fields {id}, {folder} (of the id)
            and {name} (its last part). A split is a text file of ids (`lists`, with {split}) or else, where the data
            set has none, every image whose id matches `files` (with {split}). `convert` names the command that writes
            the masks.
    """

    name: str
    root: Path
    protocol: Protocol
    classes: tuple[str, ...]
    has_background: bool
    stuff: tuple[str, ...]
    ignore_index: int
    labels: tuple[int, ...]
    test_sizes: tuple[int, ...]
    layout: dict[str, Any]

    @property
    def foreground(self) -> tuple[str, ...]:
        """The names that a model is asked for."""
        return self.classes[1:] if self.has_background else self.classes

    @property
    def folder(self) -> Path:
        """The folder that holds images, masks and splits."""
        return self.root / self.layout["folder"]

    def image_path(self, image_id: str) -> Path:
        """The photograph."""
        return self._path("images", image_id)

    def mask_path(self, image_id: str) -> Path:
        """The indexed PNG of raw class ids."""
        return self._path("masks", image_id)

    def split_path(self, split: Split) -> Path:
        """The list of image ids; the folder of images where the data set has no lists."""
        return self._origin(self.layout[split])

    def whole(self, num_images: int) -> int | None:
        """Size of the whole test split, given how many images there are: where two sizes are right, the closest."""
        return min(self.test_sizes, key=lambda size: abs(size - num_images), default=None)

    def ids(self, split: Split, limit: int | None = None) -> list[str]:
        """The first `limit` (None: all) ids of a split; a tune split that the root does not have is empty.

        Raises:
            BadInput: the list is absent, empty, repeats an id or holds a path; a file that it names is absent; or a
                test split is larger than the data set's (a smaller one is a part of it, see `whole`).
        """
        name, path = self.layout[split], self.split_path(split)
        if split == "tune" and not path.exists():
            return []
        found = self._find(name)
        if split == "tune" and "files" in self.layout and not any(self.mask_path(i).is_file() for i in found):
            return []
        if split == "test":
            self._check_size(found, path)
        return self._present(found[:limit], path, masks=True)

    def listed(self, name: str, *, masks: bool) -> list[str]:
        """All ids of any list beside the splits, such as `trainaug`; their masks need be there only when asked for.

        Raises:
            BadInput: see `ids`.
        """
        path, found = self._origin(name), self._find(name)
        if not found:
            raise BadInput(path, "lists no image", NO_IMAGE if "lists" in self.layout else REMEDY)
        return self._present(found, path, masks=masks)

    def _path(self, kind: Literal["images", "masks"], image_id: str) -> Path:
        folder, _, name = image_id.rpartition("/")
        return self.folder / self.layout[kind].format(id=image_id, folder=folder, name=name)

    def _origin(self, name: str) -> Path:
        """What says which images a split has: its list, or the folder that they lie in."""
        if "lists" in self.layout:
            return self.folder / self.layout["lists"].format(split=name)
        return self.folder / self.layout["images"].split("{id}")[0] / name

    def _find(self, name: str) -> list[str]:
        remedy = f"Is {self.root} the folder that holds the whole benchmark?"
        if "lists" in self.layout:
            return listed_ids(self._origin(name), self._conversion() or remedy)
        if not self._origin(name).is_dir():
            raise BadInput(self._origin(name), "no such folder", remedy)
        return matching_ids(self.folder, self.layout["images"], self.layout["files"].format(split=name))

    def _check_size(self, found: list[str], path: Path) -> None:
        if not found:
            raise BadInput(path, "lists no image", NO_IMAGE if "lists" in self.layout else REMEDY)
        if self.test_sizes and len(found) > max(self.test_sizes):
            sizes = " or ".join(f"{size:,}" for size in self.test_sizes)
            remedy = f"Restore the official {self.layout['test']} split"
            raise BadInput(path, f"{len(found):,} images, but the test split of {self.name} has {sizes}", remedy)

    def _present(self, found: list[str], path: Path, *, masks: bool) -> list[str]:
        listed, remedy = "lists it", "Add the file or delete that line"
        if "files" in self.layout:
            listed, remedy = "holds its image", REMEDY
        for image_id in found:
            if not self.image_path(image_id).is_file():
                raise BadInput(self.image_path(image_id), f"no such file, but {path} {listed}", remedy)
            if masks and not self.mask_path(image_id).is_file():
                remedy = self._conversion() or remedy
                raise BadInput(self.mask_path(image_id), f"no such file, but {path} {listed}", remedy)
        return found

    def _conversion(self) -> str:
        """The remedy for masks that a command of ours writes."""
        command = self.layout.get("convert")
        return f"Run `tessera convert {command} --root {self.root}`" if command else ""

    def image(self, image_id: str) -> UInt8[np.ndarray, "height width 3"]:
        """The photograph alone.

        Raises:
            BadInput: unreadable.
        """
        return decode_rgb(self.image_path(image_id).read_bytes(), str(self.image_path(image_id)))

    def parts(self, ids: Sequence[str]) -> Iterator[list[Sample]]:
        """The samples in order, as many at once as `IMAGES_AT_ONCE` and `BYTES_AT_ONCE` allow, at least one.

        Raises:
            BadInput: see `sample`.
        """
        part: list[Sample] = []
        for image_id in ids:
            part.append(self.sample(image_id))
            if len(part) == IMAGES_AT_ONCE or sum(sample.image.nbytes for sample in part) >= BYTES_AT_ONCE:
                yield part
                part = []
        if part:
            yield part

    def sample(self, image_id: str) -> Sample:
        """Image and mask.

        Raises:
            BadInput: unreadable, of different sizes, or the mask holds values that are no class.
        """
        image, path = self.image(image_id), self.mask_path(image_id)
        raw = read_indices(path, voc_palette=self.layout.get("palette") == "voc")
        label = to_labels(raw, np.array(self.labels, np.int16), path)
        if image.shape[:2] != label.shape:
            sizes = f"{label.shape[1]}x{label.shape[0]} pixels, its image {image.shape[1]}x{image.shape[0]}"
            raise BadInput(path, sizes, "Restore both files from the original archive")
        return Sample(id=image_id, image=image, label=label)

    def digest(self, ids: Iterable[str], *, masks: bool = True) -> str:
        """sha256 of the ids and bytes of their images, and of their masks."""
        total = hashlib.sha256()
        for image_id in ids:
            for path in (self.image_path(image_id), *([self.mask_path(image_id)] if masks else [])):
                total.update(f"{image_id}\0{path.stat().st_size}\0".encode() + path.read_bytes())
        return total.hexdigest()


def read_layout(name: str) -> dict[str, Any]:
    """The data file of a benchmark.

    Raises:
        ValueError: no such benchmark.
    """
    if name not in names():
        raise ValueError(f"unknown benchmark {name!r}: choose from {', '.join(names())}")
    return json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def open_benchmark(name: str, root: Path, protocol: Protocol) -> Benchmark:
    """The benchmark `name` whose layout folder (such as VOCdevkit) lies in `root`.

    Raises:
        ValueError: no such benchmark.
        BadInput: the layout is not there, or its class list is broken.
    """
    layout = read_layout(name)
    if not (root / layout["folder"]).is_dir():
        remedy = f"Give the folder that holds {layout['folder'].split('/')[0]} as the root of {name}"
        raise BadInput(root / layout["folder"], "no such folder", remedy)
    layout["images"] = _images(layout, root)
    listed, where = layout, f"classes/{name}.json"
    if "class_file" in layout:
        where = str(root / layout["class_file"])
        listed = read_json(Path(where), "Run `dvc repro` to write the benchmark again")
    sizes = layout["num_test_images"]
    try:
        named = listed["classes"]  # a list where both protocols use the same names
        classes = check_class_names(named if isinstance(named, list) else named[protocol], where)
        return Benchmark(
            name=name,
            root=root,
            protocol=protocol,
            classes=classes,
            has_background=bool(listed["background"]),
            stuff=tuple(listed["stuff"]),
            ignore_index=layout["ignore_index"],
            labels=_labels(layout, len(classes)),
            test_sizes=tuple(sizes if isinstance(sizes, list) else [sizes] if sizes else []),
            layout=layout,
        )
    except (KeyError, TypeError, ValueError) as error:
        remedy = 'Expected {"classes": ["background", ...], "background": true, "stuff": [...]}'
        raise BadInput(where, f"not a class list: {error}", remedy) from error


def _images(layout: dict[str, Any], root: Path) -> str:
    """The layout's way to the images; of several, the first whose folder of test images is there."""
    ways = [layout["images"]] if isinstance(layout["images"], str) else layout["images"]
    folders = {way: root / layout["folder"] / way.split("{id}")[0] / layout["test"] for way in ways}
    return next((way for way, folder in folders.items() if folder.is_dir()), ways[0])


def _labels(layout: dict[str, Any], num_classes: int) -> tuple[int, ...]:
    """The table from raw values to labels; a layout without `raw_ids` stores labels, and its ignore index."""
    ignore = layout["ignore_index"]
    raw = layout.get("raw_ids", [f"0-{num_classes - 1}"])
    if len(values(raw)) != num_classes:
        raise ValueError(f"{num_classes} classes for {len(values(raw))} raw ids")
    return tuple(label_table(raw, 0, layout.get("ignored", [str(ignore)]), ignore).tolist())
