"""reports/preview.png: the README's picture, a column per image and a row per view of it."""

import io
import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from pipeline.reporting.collect import PanelSet
from pipeline.reporting.labels import kind, method_title

SIDE, GAP, FONT = 96, 4, 13  # pixels
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
    first = [panel for panel in sources[0].panels if panel["id"] in shared]
    rows = [(NAMES[view], sources[0], view) for view in ROWS if all(view in panel for panel in first)]
    # What stands in brackets gets a line of its own.
    rows += [(method_title(source.method).replace(" (", "\n("), source, "prediction") for source in sources]
    rows.append((NAMES["truth"], sources[0], "truth"))
    font, step = ImageFont.load_default(FONT), SIDE + GAP
    pen = ImageDraw.Draw(Image.new("1", (1, 1)))
    label = math.ceil(max(pen.multiline_textbbox((0, 0), title, font=font)[2] for title, _, _ in rows)) + 2 * GAP
    sheet = Image.new("RGB", (label + step * len(shared), step * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for y, (title, source, view) in enumerate(rows):
        draw.multiline_text((GAP, y * step + SIDE // 2), title, fill="black", font=font, anchor="lm")
        for x, image in enumerate(shared):
            panel = next(p for p in source.panels if p["id"] == image)
            with Image.open(source.folder / panel[view]) as picture:
                # Nearest: a label's colour must not blend into another's.
                tile = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.NEAREST)
            sheet.paste(tile, (label + x * step, y * step))
    buffer = io.BytesIO()
    sheet.quantize(128).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()
