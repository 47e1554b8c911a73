"""Several lists as one data set.

A list of a mix has shards of its own, numbered from its place in the mix: another list beside it, or another limit,
changes none of them, so that the first list's shards are those that it has alone. Training permutes blocks of rows over
all shards, which is where the lists meet; `weight` decides with how many rows each takes part.
"""

from dataclasses import dataclass
from typing import Annotated

from pipeline.params import Range
from pipeline.sources.annotations import Kind, Layout

LISTS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class Listed:
    """One list of links or images; in a mix, its own block. The keys are those of block `download`.

    Attributes:
        limit: rows of the list, from its beginning, that are looked at; None for all.
        weight: the share of these that is taken, chosen by a hash of link and caption: the same rows every time, and
            those of a smaller share are among those of a larger one.
    """

    source: Kind
    annotations: str
    images: str
    layout: Layout
    url_column: str
    caption_column: str
    limit: Annotated[int, Range(1)] | None
    weight: Annotated[float, Range(0, 1, low_open=True)]
