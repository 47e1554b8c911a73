"""Benchmarks in their official on-disk layouts: RGB image, class-id mask, class list.

A benchmark is a data file, `classes/<name>.json`: layout, splits, names per protocol, background words. Reading checks
every file that a split names before the first image is scored.

Axes: height and width in pixels of the stored image; predictions are resized to it, masks never are.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from pipeline.artifacts.files import BadInput, read_json
from pipeline.artifacts.shards import decode_rgb

Protocol = Literal["native", "unified"]
Split = Literal["tune", "test"]
_FOLDER = resources.files("pipeline.datasets") / "classes"
NO_IMAGE = "Write one image id per line, without extension"
_ID = re.compile(r"[A-Za-z0-9][\w.-]*")


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
        num_test_images: size of the whole test split; None where it is not fixed.
    """

    name: str
    root: Path
    protocol: Protocol
    classes: tuple[str, ...]
    has_background: bool
    stuff: tuple[str, ...]
    ignore_index: int
    num_test_images: int | None
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
        return self.folder / self.layout["images"] / f"{image_id}.jpg"

    def mask_path(self, image_id: str) -> Path:
        """The palette PNG of class ids."""
        return self.folder / self.layout["masks"] / f"{image_id}.png"

    def split_path(self, split: Split) -> Path:
        """The list of image ids."""
        return self.folder / self.layout["splits"] / f"{self.layout[split]}.txt"

    def ids(self, split: Split, limit: int | None = None) -> list[str]:
        """The first `limit` (None: all) ids of a split; a tune split that the root does not have is empty.

        Raises:
            BadInput: the list is absent, empty, repeats an id or holds a path; or a file that it names is absent.
        """
        path = self.split_path(split)
        if split == "tune" and not path.is_file():
            return []
        found = _read_ids(path, self.root)
        if not found and split == "test":
            raise BadInput(path, "lists no image", NO_IMAGE)
        return self._present(found[:limit], path, masks=True)

    def listed(self, name: str, *, masks: bool) -> list[str]:
        """All ids of any list beside the splits, such as `trainaug`; their masks need be there only when asked for.

        Raises:
            BadInput: see `ids`.
        """
        path = self.folder / self.layout["splits"] / f"{name}.txt"
        found = _read_ids(path, self.root)
        if not found:
            raise BadInput(path, "lists no image", NO_IMAGE)
        return self._present(found, path, masks=masks)

    def _present(self, found: list[str], path: Path, *, masks: bool) -> list[str]:
        for image_id in found:
            for file in (self.image_path(image_id), *([self.mask_path(image_id)] if masks else [])):
                if not file.is_file():
                    raise BadInput(file, f"no such file, but {path} lists it", "Add the file or delete that line")
        return found

    def image(self, image_id: str) -> UInt8[np.ndarray, "height width 3"]:
        """The photograph alone.

        Raises:
            BadInput: unreadable.
        """
        return decode_rgb(self.image_path(image_id).read_bytes(), str(self.image_path(image_id)))

    def sample(self, image_id: str) -> Sample:
        """Image and mask.

        Raises:
            BadInput: unreadable, of different sizes, or the mask holds ids that are no class.
        """
        image = self.image(image_id)
        label = self._label(self.mask_path(image_id))
        if image.shape[:2] != label.shape:
            sizes = f"{label.shape[1]}x{label.shape[0]} pixels, its image {image.shape[1]}x{image.shape[0]}"
            raise BadInput(self.mask_path(image_id), sizes, "Restore both files from the original archive")
        return Sample(id=image_id, image=image, label=label)

    def digest(self, ids: Iterable[str], *, masks: bool = True) -> str:
        """sha256 of the ids and bytes of their images, and of their masks."""
        total = hashlib.sha256()
        for image_id in ids:
            for path in (self.image_path(image_id), *([self.mask_path(image_id)] if masks else [])):
                total.update(f"{image_id}\0{path.stat().st_size}\0".encode() + path.read_bytes())
        return total.hexdigest()

    def _label(self, path: Path) -> UInt8[np.ndarray, "height width"]:
        mode, label = _read_index_image(path)
        if mode not in ("P", "L"):
            remedy = "Write class ids as an indexed (palette) PNG, as SegmentationClass of VOC holds them"
            raise BadInput(path, f"is a {mode} image, not an indexed one", remedy)
        wrong = np.unique(label[(label >= len(self.classes)) & (label != self.ignore_index)])
        if wrong.size:
            ids = ", ".join(map(str, wrong[:8]))
            expected = f"0..{len(self.classes) - 1} or {self.ignore_index}"
            raise BadInput(path, f"holds label ids {ids} outside {expected}", "Check mask and class list")
        return label


def open_benchmark(name: str, root: Path, protocol: Protocol) -> Benchmark:
    """The benchmark `name` whose layout folder (such as VOCdevkit) lies in `root`.

    Raises:
        ValueError: no such benchmark.
        BadInput: the layout is not there, or its class list is broken.
    """
    if name not in names():
        raise ValueError(f"unknown benchmark {name!r}: choose from {', '.join(names())}")
    layout = json.loads((_FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    if not (root / layout["folder"]).is_dir():
        remedy = f"Give the folder that holds {layout['folder'].split('/')[0]} as the root of {name}"
        raise BadInput(root / layout["folder"], "no such folder", remedy)
    listed, where = layout, f"classes/{name}.json"
    if "class_file" in layout:
        where = str(root / layout["class_file"])
        listed = read_json(Path(where), "Run `dvc repro` to write the benchmark again")
    try:
        classes = listed["classes"] if "class_file" in layout else listed["classes"][protocol]
        return Benchmark(
            name=name,
            root=root,
            protocol=protocol,
            classes=check_class_names(classes, where),
            has_background=bool(listed["background"]),
            stuff=tuple(listed["stuff"]),
            ignore_index=layout["ignore_index"],
            num_test_images=layout["num_test_images"],
            layout=layout,
        )
    except (KeyError, TypeError, ValueError) as error:
        remedy = 'Expected {"classes": ["background", ...], "background": true, "stuff": [...]}'
        raise BadInput(where, f"not a class list: {error}", remedy) from error


def _read_ids(path: Path, root: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise BadInput(path, "no such file", f"Is {root} the folder that holds the whole benchmark?") from None
    except UnicodeDecodeError as error:
        raise BadInput(path, f"not UTF-8 ({error.reason})", "Write one image id per line") from error
    found = [line.strip() for line in lines if line.strip()]
    for image_id in found:
        if not _ID.fullmatch(image_id):
            raise BadInput(path, f"{image_id!r} is no image id", "Write one file name per line, without extension")
    if len(set(found)) != len(found):
        twice = next(image_id for image_id in found if found.count(image_id) > 1)
        raise BadInput(path, f"lists {twice} twice", "Delete one of the two lines")
    return found


def _read_index_image(path: Path) -> tuple[str, np.ndarray]:
    """Mode and raw values: palette indices, never the palette's colours."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(BytesIO(path.read_bytes())) as image:
            return image.mode, np.asarray(image)
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise BadInput(path, f"not readable as an image ({error})", "Restore it from the original archive") from error
