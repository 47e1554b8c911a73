"""The panels image | regions | groups | prediction | truth, embedded small enough that a page of them opens at once."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from pipeline.reporting import Config
from pipeline.reporting.collect import Findings, PanelSet
from pipeline.reporting.labels import MISSING, benchmark_title, clean, method_title, points

SMALL = 200  # pixels: up to here a picture is enlarged without smoothing, so that single pixels stay visible
JPEG_QUALITY = 82
STAGES = ("stage1", "stage2", "stage3")  # GroupViT and ZeroSeg have two, OVSegmentor one
# Not every method has regions; one trained on pseudo-masks has masks of its own too, one that groups has its stages.
OPTIONAL = ("regions", "masks", *STAGES)
COLUMNS = ("image", *OPTIONAL, "prediction", "truth")


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


def sections(findings: Findings, first: tuple[str, str], config: Config) -> list[dict[str, Any]]:
    """The picture sections; each has its legend and at most `config.panels` rows.

    `first` names the method and benchmark that come before the others, which stand by rank.
    """
    order = {(s.method, s.benchmark): i for i, s in enumerate(sorted(findings.scores, key=lambda s: s.rank))}
    sets = sorted(
        findings.panels,
        key=lambda s: ((s.method, s.benchmark) != first, order.get((s.method, s.benchmark), len(order)), s.benchmark),
    )
    return [_panel_set(panel_set, config) for panel_set in sets]


def _panel_set(source: PanelSet, config: Config) -> dict[str, Any]:
    name = method_title(source.method)
    rows = [_panel(source, panel, name, config) for panel in choose(source.panels, config.panels)]
    seen = {label for row in rows for label in row["present"]}
    legend = [
        (label, "#{:02x}{:02x}{:02x}".format(*source.colors[label]), label in seen)
        for label in source.classes
        if label in source.colors
    ]
    return {
        "title": f"{name} on {benchmark_title(source.benchmark)}",
        "legend": legend,
        "rows": rows,
        "more": len(source.panels) - len(rows),
    }


def choose(panels: Sequence[dict[str, Any]], number: int) -> list[dict[str, Any]]:
    """At most `number` panels in their order: up to a quarter each of the best and the worst, else those by seed."""
    if len(panels) <= number:
        return list(panels)
    extremes = [
        i
        for extreme in ("best", "worst")
        for i in [i for i, panel in enumerate(panels) if panel.get("picked") == extreme][: number // 4]
    ]
    others = sorted(
        (i for i in range(len(panels)) if i not in extremes), key=lambda i: panels[i].get("picked") != "seed"
    )
    return [panels[i] for i in sorted(extremes + others[: number - len(extremes)])]


def _panel(source: PanelSet, panel: dict[str, Any], name: str, config: Config) -> dict[str, Any]:
    label = clean(panel.get("id", "?"))
    present = panel["present"]
    inside = ", ".join(present) or "nothing named"
    own = "masks" in panel or STAGES[0] in panel
    grouped = [column for column in STAGES if column in panel]
    texts = {
        "image": ("Image", f"Test image {label}, showing {inside}"),
        "regions": ("Pseudo-masks" if own else "Regions", f"Regions of image {label}, each in a colour of its own"),
        "masks": ("Its own masks", f"Masks that {name} drew in image {label}, each in a colour of its own"),
        **{
            column: (
                f"Groups of stage {number}" if len(grouped) > 1 else "Groups",
                f"The groups of stage {number} of {len(grouped)} into which {name} gathered image {label}",
            )
            for number, column in enumerate(grouped, start=1)
        },
        "prediction": ("Prediction", f"What {name} answered for image {label}, in the legend's colours"),
        "truth": ("Truth", f"True masks of image {label}: {inside}"),
    }
    pictures = []
    for column in (column for column in COLUMNS if column in panel or column not in OPTIONAL):
        picture = embed(source.folder, panel.get(column), config.image_px, photograph=column == "image")
        title, alt = texts[column]
        pictures.append(
            {"title": title, "alt": alt, "picture": picture, "file": clean(panel.get(column) or "none named")}
        )
    miou = panel.get("miou")
    return {
        "id": label,
        "picked": {"seed": "picked by seed", "best": "among the best", "worst": "among the worst"}.get(
            str(panel.get("picked")), clean(panel.get("picked") or "")
        ),
        "miou": points(100 * miou) if isinstance(miou, int | float) and miou == miou else MISSING,
        "caption": clean(panel.get("caption") or ""),
        "worst": panel.get("picked") == "worst",
        "mistakes": _mistakes(panel.get("confused") or []),
        "present": present,
        "pictures": pictures,
    }


def _mistakes(confused: Sequence[dict[str, Any]]) -> str:
    """An image's largest mistakes in words, with their share of its pixels."""
    return "; ".join(
        f"{clean(item['truth'])} taken for {clean(item['answer'])} ({points(100 * item['share'])}\u00a0%)"
        for item in confused
    )
