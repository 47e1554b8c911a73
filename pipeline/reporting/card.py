"""The card of the data: what every list yielded, how long captions are and how large images, repeats, entities.

Shards are read one at a time, three columns of each, so that memory does not grow with the set.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow.compute as pc

from pipeline.artifacts import decisions
from pipeline.artifacts.files import BadInput
from pipeline.artifacts.shards import LIST_SHARDS, read_successes
from pipeline.project import Project
from pipeline.reporting.funnel import Data
from pipeline.reporting.labels import clean
from pipeline.sources import retries
from pipeline.sources.download import Config

WORDS = (0, 1, 2, 4, 8, 16, 32, 64, 128)  # lower ends of the bins: words parted by blanks
SIDES = (0, 32, 64, 128, 256, 512, 1024, 2048, 4096)  # px of the shorter side as it was fetched
RETRIED = "came later"


@dataclass(kw_only=True, slots=True)
class Yield:
    """Rows of one list: `listed`, of these `downloaded`, of these `kept` by the filter."""

    listed: int = 0
    downloaded: int = 0
    kept: int = 0


@dataclass(kw_only=True, slots=True)
class Card:
    """Counts over the downloaded rows; histograms have a bin from each end of `WORDS` and `SIDES` to the next."""

    lists: dict[str, Yield] = field(default_factory=dict)
    reasons: dict[str, dict[str, int]] = field(default_factory=dict)
    words: list[int] = field(default_factory=lambda: [0] * len(WORDS))
    sides: list[int] = field(default_factory=lambda: [0] * len(SIDES))
    repeats: dict[str, int] = field(default_factory=dict)
    entities: list[tuple[str, int]] = field(default_factory=list)


def card(project: Project, data: Data) -> Card:
    """The card of what is downloaded, and of what the filter said where it has run.

    Args:
        data: what `gather` found of the project.

    Raises:
        BadInput: stage `download` has not run, or a shard is torn.
    """
    made = Card(repeats=decisions.counts(project.root))
    names = _names(project)
    words, sides = np.zeros(len(WORDS), np.int64), np.zeros(len(SIDES), np.int64)
    for row, folder in project.inputs("download"):
        of = made.lists.setdefault(_list_of(row.shard, names), Yield())
        of.listed += row.rows_in
        of.downloaded += row.rows
        rows = read_successes(folder / f"{row.shard}.parquet")
        captions = pc.fill_null(rows["caption"], "")
        words += _histogram(np.array([len(text.split()) for text in captions.to_pylist()], np.int64), WORDS)
        shorter = pc.min_element_wise(rows["original_width"], rows["original_height"])  # type: ignore
        sides += _histogram(pc.fill_null(shorter, 0).to_numpy(), SIDES)
    made.words, made.sides = words.tolist(), sides.tolist()
    if project.manifest_path("filter").exists():
        for row in project.manifest("filter").rows:
            made.lists.setdefault(_list_of(row.shard, names), Yield()).kept += row.rows
    made.reasons = {step.title: step.reasons for step in data.steps[:2]}
    made.entities = data.entities
    return made


def drawn(project: Project, data: Data) -> Card | None:
    """The card, where something is downloaded and its shards are here; a note in `data` where they are not."""
    if not project.manifest_path("download").exists():
        return None
    try:
        return card(project, data)
    except BadInput as error:
        data.notes.append(f"The card of the data is not drawn: {clean(error)}.")
        return None


def _names(project: Project) -> list[str]:
    config = project.config("download", Config)
    return [listed.annotations for listed in config.lists] or ["scenes"]


def _list_of(shard: str, names: Sequence[str]) -> str:
    """The list of a shard by its number; a round of retries counts apart, for its rows were listed before."""
    number = int(shard)
    if len(names) == 1:
        return RETRIED if number >= retries.FIRST else names[0]
    place = number // LIST_SHARDS
    return names[place] if place < len(names) else RETRIED


def _histogram(values: np.ndarray, ends: Sequence[int]) -> np.ndarray:
    """Counts of integers from each end to the next, the last without a bound; int64 [ends]."""
    at = np.searchsorted(np.array(ends), values, side="right") - 1
    return np.bincount(at, minlength=len(ends)).astype(np.int64)


def text(made: Card, width: int = 32, top: int = 20) -> str:
    """The card for a terminal."""
    lines = [f"{'list':44}{'listed':>12}{'downloaded':>12}{'kept':>12}"]
    lines += [f"{name[-43:]:44}{of.listed:>12,}{of.downloaded:>12,}{of.kept:>12,}" for name, of in made.lists.items()]
    for title, reasons in made.reasons.items():
        lines += ["", f"lost before they were {title}", *_bars(Counter(reasons).most_common(top), width)]
    lines += ["", "words of a caption (all its lines)", *_bars(labelled(made.words, WORDS), width)]
    lines += ["", "shorter side of an image, px", *_bars(labelled(made.sides, SIDES), width)]
    if made.repeats:
        lines += ["", "repeats and leaks (tessera duplicates)", *_bars(Counter(made.repeats).most_common(), width)]
    if made.entities:
        lines += ["", f"entities, the first {top} of {len(made.entities)}", *_bars(made.entities[:top], width)]
    return "\n".join(lines)


def labelled(counts: Sequence[int], ends: Sequence[int]) -> list[tuple[str, int]]:
    """Bins with what they hold, empty ones at both ends left out."""
    filled = [at for at, count in enumerate(counts) if count]
    if not filled:
        return []
    labels = [f"{low} to {high - 1}" if high - low > 1 else f"{low}" for low, high in zip(ends, ends[1:], strict=False)]
    labels.append(f"{ends[-1]} and more")
    return list(zip(labels, counts, strict=True))[filled[0] : filled[-1] + 1]


def _bars(counts: Sequence[tuple[str, int]], width: int) -> list[str]:
    most = max((count for _, count in counts), default=0)
    return [
        f"  {name[:40]:40}{count:>12,} {'#' * round(width * count / most) if most else ''}" for name, count in counts
    ]
