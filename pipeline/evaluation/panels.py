"""Pictures of single images: image | pseudo-masks | groups | prediction | truth, as PNG files and a `panels.json`.

Label maps are written in flat colours, background black, the ignored border light; an image is reduced to a given
longer side, label maps by nearest neighbour.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Integer, UInt8
from PIL import Image

from pipeline.artifacts.files import atomic_json
from pipeline.datasets.label_ids import IGNORED, Color, class_color
from pipeline.evaluation.config import PanelConfig
from pipeline.evaluation.rates import fraction

# Regions have no class: light, well separated colours that no class near black has. Source: ColorBrewer "Set3".
REGIONS: tuple[Color, ...] = (
    (141, 211, 199), (255, 255, 179), (190, 186, 218), (251, 128, 114), (128, 177, 211), (253, 180, 98),
    (179, 222, 105), (252, 205, 229), (217, 217, 217), (188, 128, 189), (204, 235, 197), (255, 237, 111),
)  # fmt: skip


def colored(
    labels: Integer[np.ndarray, "height width"], colors: Sequence[Color]
) -> UInt8[np.ndarray, "height width 3"]:
    """A label map in colours, which repeat when there are more labels."""
    return np.array(colors, dtype=np.uint8)[labels % len(colors)]


def colored_classes(
    labels: Integer[np.ndarray, "height width"], num_classes: int, ignore_index: int | None
) -> UInt8[np.ndarray, "height width 3"]:
    """A map of class ids in VOC's colours, the ignored pixels in `IGNORED`."""
    picture = colored(np.minimum(labels, num_classes - 1), [class_color(i) for i in range(num_classes)])
    if ignore_index is not None:
        picture[labels == ignore_index] = IGNORED
    return picture


def choose(per_image: Mapping[str, float], config: PanelConfig, seed: int) -> list[tuple[str, str]]:
    """(id, how it was picked): "seed", the same ids for every method, then "best" and "worst" of the others by mIoU."""
    ids = sorted(per_image)
    drawn = np.random.default_rng(seed).permutation(len(ids))[: config.seeded]
    chosen = [(ids[index], "seed") for index in sorted(drawn)]
    rest = [image_id for image_id in ids if image_id not in {i for i, _ in chosen} and per_image[image_id] >= 0]
    ranked = sorted(rest, key=lambda image_id: (-per_image[image_id], image_id))
    best = ranked[: config.best]
    worst = [image_id for image_id in reversed(ranked) if image_id not in best][: config.worst]
    return chosen + [(image_id, "best") for image_id in best] + [(image_id, "worst") for image_id in worst]


def reduce(picture: UInt8[np.ndarray, "height width 3"], side: int, *, smooth: bool) -> Image.Image:
    """The picture with a longer side of at most `side` pixels."""
    image = Image.fromarray(picture)
    if max(image.size) <= side:
        return image
    factor = side / max(image.size)
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.LANCZOS if smooth else Image.Resampling.NEAREST)


class Look(NamedTuple):
    """One image as a panel shows it.

    pictures: by column `image`, `prediction`, `truth`, and where there are any `regions` (the pseudo-masks, or else the
    model's own), `masks` (the model's own), or instead of these `stage1`, `stage2`, ... (the groups of a model that
    groups in stages). present: names of its classes, background left out. confused: its mistakes, see
    `rates.confused`.
    """

    pictures: dict[str, UInt8[np.ndarray, "height width 3"]]
    present: list[str]
    confused: list[dict[str, Any]]


def draw(
    folder: Path,
    chosen: Sequence[tuple[str, str]],
    per_image: Mapping[str, float],
    look: Callable[[str], Look],
    classes: Sequence[str],
    side: int,
) -> None:
    """Write every chosen image's pictures, then `panels.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    panels: list[dict[str, Any]] = []
    for image_id, picked in chosen:
        panel: dict[str, Any] = {"id": image_id, "picked": picked, "miou": fraction(per_image[image_id])}
        shown = look(image_id)
        for column, picture in shown.pictures.items():
            panel[column] = f"{image_id.replace('/', '_')}_{column}.png"
            reduce(picture, side, smooth=column == "image").save(folder / panel[column], "PNG")
        panels.append({**panel, "present": shown.present, "confused": shown.confused})
    colors = {name: list(class_color(index)) for index, name in enumerate(classes)}
    atomic_json(folder / "panels.json", {"classes": list(classes), "colors": colors, "panels": panels})
