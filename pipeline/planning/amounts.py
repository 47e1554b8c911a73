"""How many images each stage of a whole run gets, from the parameters and the lists and benchmarks that are there.

A list of links that is not on this machine yet has the length that its publishers state; of its links a part is dead.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from pipeline.artifacts.files import BadInput
from pipeline.artifacts.urls import is_url
from pipeline.datasets.benchmarks import open_benchmark
from pipeline.evaluation.config import Config as Evaluation
from pipeline.evaluation.pairs import SCENES
from pipeline.project import Project
from pipeline.selftraining.config import Config as SelfTraining
from pipeline.sources import download
from pipeline.sources.mixes import Listed

# Rows of the published lists; sources as in README.md, "The full data sets".
KNOWN_ROWS = {"cc3m": 3_318_333, "cc12m": 12_423_374, "yfcc15m": 14_829_396, "redcaps": 12_011_121}
# Share of links that still answer. Source: design section 7 (CC12M 62 %, CC3M two thirds, RedCaps 7 of 12 M).
# YFCC15M is served from one archive: GroupViT had 14,615,499 of 14,829,396 (README).
ALIVE = {"cc3m": 0.667, "cc12m": 0.62, "redcaps": 7 / 12, "yfcc15m": 14_615_499 / 14_829_396}


@dataclass(frozen=True, kw_only=True, slots=True)
class Amount:
    """What goes into the download.

    Attributes:
        rows: rows of all lists, or generated scenes with a caption.
        shards: of the download.
        alive: share of them whose image is got; None where the rehearsal measures it.
        notes: what is assumed.
    """

    rows: int
    shards: int
    alive: float | None
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """What a benchmark of the evaluation has.

    Attributes:
        test, tuned, learned: images that count, those that choose a threshold, and those from which self-training
            learns.
        size: bytes of an image with its mask, on average.
    """

    test: int
    tuned: int
    learned: int
    size: float


def of_benchmarks(project: Project) -> dict[str, Scored]:
    """By name, those that are here; generated ones have no size before they are."""
    config, learning = project.config("evaluate", Evaluation), project.config("selftrain", SelfTraining)
    found: dict[str, Scored] = {}
    tunes = any(config.rules(config.protocol).tune.values())
    for entry in config.benchmarks:
        if entry.root == SCENES:
            block = project.params["scenes"]
            test = min(entry.limit or block["num_val"], block["num_val"])
            tuned = min(entry.tune_limit or block["num_tune"], block["num_tune"]) if tunes else 0
            found[entry.name] = Scored(test=test, tuned=tuned, learned=block["num_tune"], size=0.0)
            continue
        try:
            benchmark = open_benchmark(entry.name, project.path(entry.root), config.protocol)
            ids = benchmark.ids("test", entry.limit)
            tuned = len(benchmark.ids("tune", entry.tune_limit)) if tunes and benchmark.has_background else 0
        except BadInput:
            continue
        try:
            split = learning.splits.get(entry.name) or benchmark.layout["tune"]
            learned = len(benchmark.listed(split, masks=False))
        except BadInput:
            learned = 0
        sizes = [file(i).stat().st_size for i in ids for file in (benchmark.image_path, benchmark.mask_path)]
        found[entry.name] = Scored(test=len(ids), tuned=tuned, learned=learned, size=sum(sizes) / len(ids))
    return found


def name_of(listed: Listed) -> str:
    """The name under which `KNOWN_ROWS` and `ALIVE` have a list."""
    return listed.layout if listed.source == "urls" else listed.source


def on_the_web(project: Project) -> bool:
    """Whether the images are still to be asked for at other machines, which a plan does not do."""
    lists = project.config("download", download.Config).lists
    return any(listed.source in download.LINKS or is_url(listed.images) for listed in lists)


def of_download(project: Project) -> Amount:
    """Rows and shards of the download stage.

    Raises:
        BadInput: a list is absent and its length is not known.
    """
    config = project.config("download", download.Config)
    if config.source == "scenes":
        rows = project.params["scenes"]["num_train"]
        return Amount(rows=rows, shards=-(-rows // project.params["scenes"]["rows_per_shard"]), alive=None, notes=())
    try:
        tasks = download.tasks(project)
    except BadInput as absent:
        return _published(config, absent)
    rows = sum(task.rows for task in tasks)
    alive, notes = _alive(config.lists, {name_of(listed): 1 for listed in config.lists})
    return Amount(rows=rows, shards=len(tasks), alive=alive, notes=notes)


def _published(config: download.Config, absent: BadInput) -> Amount:
    rows: dict[str, int] = {}
    for listed in config.lists:
        name = name_of(listed)
        if name not in KNOWN_ROWS:
            raise absent
        rows[name] = round(min(KNOWN_ROWS[name], listed.limit or KNOWN_ROWS[name]) * listed.weight)
    alive, notes = _alive(config.lists, rows)
    stated = ", ".join(f"{name} {count:,}" for name, count in rows.items())
    shards = sum(-(-count // config.rows_per_shard) for count in rows.values())
    absence = f"{absent.file} is not there: rows as published ({stated})"
    return Amount(rows=sum(rows.values()), shards=shards, alive=alive, notes=(absence, *notes))


def _alive(lists: tuple[Listed, ...], weights: Mapping[str, int]) -> tuple[float | None, tuple[str, ...]]:
    """Mean share of links that answer, over lists of links; None where there is none on the web."""
    known = {name: ALIVE.get(name, 1.0) for name in weights}
    if not any(listed.source in download.LINKS for listed in lists):
        return None, ()
    share = sum(known[name] * weight for name, weight in weights.items()) / sum(weights.values())
    return share, (f"{share:.0%} of the links are taken to answer",)
