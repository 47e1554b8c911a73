"""From metrics, curves, panels, manifests and logs to `results.md` and one self-contained `index.html`.

`collect` and `funnel` read what the stages left, `markdown` writes what git tracks (the same inputs give the same
bytes), `html` writes the page that a person opens. Nothing is measured here.
"""

from dataclasses import dataclass
from typing import Annotated

from pipeline.params import Range


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Params block `report`.

    Attributes:
        base: git revision whose metrics the deltas are taken against; empty for none.
        panels: pictures shown per method and benchmark.
        image_px: longer side to which photographs are reduced inside the page, pixels.
        curve_points: points drawn per training curve; more are averaged in equal bins.
    """

    base: str
    panels: Annotated[int, Range(0)]
    image_px: Annotated[int, Range(16)]
    curve_points: Annotated[int, Range(2)]
