"""reports/preview.png: the README's picture, a column per image and a row per view of it."""

import io
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from pipeline.reporting.collect import PanelSet
from pipeline.reporting.labels import kind

SIDE, GAP, LABEL, FONT = 96, 4, 92, 13  # pixels
ROWS = ("image", "regions")  # of the first method; then each method's prediction, then the truth
NAMES = {"image": "image", "regions": "pseudo-masks", "truth": "truth"}


def chosen(panels: Sequence[PanelSet]) -> list[PanelSet]:
    """Trained methods and CLIP's patches on the first benchmark that has panels."""
    shown = [p for p in panels if p.method == "baseline-clip_patches" or not p.method.startswith("baseline-")]
    shown = [p for p in shown if kind(p.method) in ("method", "baseline", "bound")]
    shown.sort(key=lambda p: (p.benchmark, p.method.startswith("baseline-"), p.method))
    return [p for p in shown if p.benchmark == shown[0].benchmark]


def preview(sources: Sequence[PanelSet], columns: int) -> bytes | None:
    """PNG bytes of the first `columns` images that were picked by seed and that every source shows; None without any.

    `sources` are the panels of several methods on one benchmark, in the order of their rows.
    """
    seeded = [[p["id"] for p in source.panels if p["picked"] == "seed"] for source in sources]
    shared = [name for name in seeded[0] if all(name in names for names in seeded)][:columns] if seeded else []
    if not shared:
        return None
    rows = [(NAMES[view], sources[0], view) for view in ROWS]
    rows += [(source.method, source, "prediction") for source in sources]
    rows.append((NAMES["truth"], sources[0], "truth"))
    step = SIDE + GAP
    sheet = Image.new("RGB", (LABEL + step * len(shared), step * len(rows)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT)
    for y, (name, source, view) in enumerate(rows):
        title = name.removeprefix("baseline-").replace("_", " ")
        draw.text((GAP, y * step + SIDE // 2), title, fill="black", font=font, anchor="lm")
        for x, image in enumerate(shared):
            panel = next(p for p in source.panels if p["id"] == image)
            with Image.open(source.folder / panel[view]) as picture:
                # Nearest: a label's colour must not blend into another's.
                tile = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(tile, (LABEL + x * step, y * step))
    buffer = io.BytesIO()
    sheet.quantize(128).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
