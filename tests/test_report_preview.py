"""The README's picture."""

import io
from pathlib import Path

from PIL import Image

from pipeline.reporting.collect import PanelSet
from pipeline.reporting.preview import GAP, SIDE, chosen, preview

COLOURS = {"image": (10, 200, 30), "regions": (0, 0, 255), "prediction": (255, 0, 0), "truth": (255, 255, 0)}


def panel_set(folder: Path, method: str, ids: list[str], picked: str = "seed") -> PanelSet:
    folder.mkdir(parents=True, exist_ok=True)
    for view, colour in COLOURS.items():
        Image.new("RGB", (8, 8), colour).save(folder / f"{view}.png")
    views = {view: f"{view}.png" for view in COLOURS}
    panels = [{"id": name, "picked": picked, **views} for name in ids]
    return PanelSet(method=method, benchmark="scenes", folder=folder, classes=[], colors={}, panels=panels)


def test_a_column_per_shared_image_and_a_row_per_view(tmp_path):
    sources = [
        panel_set(tmp_path / "a", "sseg", ["x", "y", "z"]),
        panel_set(tmp_path / "b", "baseline-clip_patches", ["y", "z"]),
    ]
    sheet = Image.open(io.BytesIO(preview(sources, 5))).convert("RGB")
    step = SIDE + GAP
    label = sheet.width - 2 * step
    assert label > 0 and sheet.height == 5 * step
    rows = [sheet.getpixel((label + 5, row * step + 5)) for row in range(5)]
    assert rows == [COLOURS[view] for view in ("image", "regions", "prediction", "prediction", "truth")]


def test_the_longest_title_has_room(tmp_path):
    """The last columns of pixels before the pictures hold no ink, whatever the titles are."""
    for method in ("sseg", "pseudo_mask_vit", "a_method_with_a_very_long_name_indeed"):
        sheet = Image.open(io.BytesIO(preview([panel_set(tmp_path / method, method, ["x"])], 1))).convert("L")
        label = sheet.width - SIDE - GAP
        ink = [x for x in range(label) if min(sheet.crop((x, 0, x + 1, sheet.height)).tobytes()) < 128]
        assert 0 < min(ink) and max(ink) < label - 1


def test_no_shared_image_is_no_picture(tmp_path):
    assert preview([], 3) is None
    assert preview([panel_set(tmp_path / "a", "sseg", ["x"], picked="best")], 3) is None


def test_trained_methods_and_clip_are_shown_and_no_upper_bound(tmp_path):
    names = ["baseline-clip_patches", "baseline-oracle", "sseg", "sseg-untrained", "baseline-constant"]
    panels = [panel_set(tmp_path / name, name, ["x"]) for name in names]
    assert [source.method for source in chosen(panels)] == ["sseg", "baseline-clip_patches"]
