"""A pair is a candidate and a benchmark: opened, resolved against the parameters, scored, drawn."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from pipeline.artifacts.files import BadInput, digest
from pipeline.datasets.benchmarks import Benchmark, Protocol, open_benchmark
from pipeline.evaluation import candidates, panels
from pipeline.evaluation.config import BenchmarkConfig, Config, pick, thresholds
from pipeline.evaluation.rates import confused
from pipeline.evaluation.regions import Regions
from pipeline.evaluation.scoring import Candidate, Scored, Settings, Watcher, passes, score
from pipeline.inference import BACKGROUNDS, BackgroundName
from pipeline.metrics import ConfusionMatrix
from pipeline.params import ParamsError
from pipeline.project import Project
from pipeline.text.prompts import templates

MISTAKES = 3  # named under a picture
SCENES = "scenes"  # the root that stands for the set which the scenes stage writes
VALIDATION = "val"  # its shard


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A benchmark opened for one candidate: the images that count and how they are scored."""

    spec: str
    benchmark: Benchmark
    ids: list[str]
    settings: Settings


def benchmark_root(project: Project, name: str, root: str) -> Path:
    """The folder that holds a benchmark's layout.

    Raises:
        BadInput: the scenes stage has not written its set yet.
    """
    if root != SCENES:
        return project.path(root)
    for row, folder in project.inputs("scenes"):
        if row.shard == VALIDATION:
            return folder
    remedy = "Run `dvc repro scenes`, or give another root"
    raise BadInput(project.manifest_path("scenes"), f"has no shard {VALIDATION!r} for {name}", remedy)


def open_pair(
    spec: str, entry: BenchmarkConfig, root: Path, protocol: Protocol, config: Config, project: Project
) -> Pair:
    """Open the benchmark, list its images, and resolve the protocol's rules for this candidate."""
    benchmark = open_benchmark(entry.name, root, protocol)
    tune_ids = benchmark.ids("tune", entry.tune_limit) if tuned(spec, benchmark, config, project) else []
    settings = settings_for(spec, benchmark, tune_ids, config, project)
    return Pair(spec=spec, benchmark=benchmark, ids=benchmark.ids("test", entry.limit), settings=settings)


def tuned(spec: str, benchmark: Benchmark, config: Config, project: Project) -> bool:
    """Whether this candidate's threshold is chosen on masks; without a background class there is none."""
    method, rules = candidates.rules_name(spec, project), config.rules(benchmark.protocol)
    return benchmark.has_background and pick(rules.tune, method, benchmark.name)


def settings_for(spec: str, benchmark: Benchmark, tune_ids: list[str], config: Config, project: Project) -> Settings:
    """The rules of the benchmark's protocol that hold for this candidate.

    Raises:
        ParamsError: none of its background rules can be followed.
    """
    method, rules = candidates.rules_name(spec, project), config.rules(benchmark.protocol)
    return Settings(
        templates=templates(pick(rules.templates, method, benchmark.name)),
        prompt_order=pick(rules.prompt_order, method, benchmark.name),
        backgrounds=_backgrounds(pick(rules.backgrounds, method, benchmark.name), benchmark),
        threshold=pick(rules.thresholds, method, benchmark.name),
        tune_ids=tuple(tune_ids),
        grid=tuple(thresholds(config.sweep_step)),
        pamr=rules.pamr,
        geometry=config.geometry,
        device=project.machine.device,
    )


def _backgrounds(rules: tuple[BackgroundName, ...], benchmark: Benchmark) -> tuple[BackgroundName, ...]:
    """The rules that the benchmark can follow: none without background, no extra vocabulary without stuff words."""
    if not benchmark.has_background:
        return ("none",)
    kept: tuple[BackgroundName, ...] = tuple(
        rule for rule in rules if benchmark.stuff or not BACKGROUNDS[rule].stuff_words
    )
    if not kept:
        raise ParamsError(
            f"evaluate: backgrounds: {benchmark.name} has no stuff words for {rules[0]}; name another rule"
        )
    return kept


def data_digest(pair: Pair) -> str:
    """sha256 of every image and mask that decides the score."""
    return pair.benchmark.digest([*pair.settings.tune_ids, *pair.ids])


def evaluate(pair: Pair, candidate: Candidate, *, bar: bool, watchers: Sequence[Watcher] = ()) -> Scored:
    """Score a candidate, with a progress bar where asked; the report is what the metrics file holds.

    `watchers` are told every answer that the reported score counts.
    """
    total, label = passes(candidate, len(pair.ids), pair.settings), f"{candidate.name} on {pair.benchmark.name}"
    with tqdm(total=total, desc=label, unit="image", mininterval=1.0, disable=not bar) as progress:
        scored = score(candidate, pair.benchmark, pair.ids, pair.settings, progress.update, watchers)
    known = candidate.digests
    scored.report["benchmark_digest"] = data_digest(pair)
    scored.report["digests"] = known
    scored.report["model_digest"] = next(iter(known.values())) if len(known) == 1 else digest(known) if known else None
    return scored


def draw(
    folder: Path, pair: Pair, candidate: Candidate, scored: Scored, config: Config, pseudo_masks: Regions | None
) -> None:
    """The pair's panels, with panels.json, into `folder`."""
    benchmark = pair.benchmark
    classes, ignore = benchmark.classes, benchmark.ignore_index

    def look(image_id: str) -> panels.Look:
        sample = benchmark.sample(image_id)
        (answer,) = scored.answer([sample])
        columns = {"image": sample.image}
        sources = (pseudo_masks, None if candidate.stages else candidate.regions)
        maps = [regions(sample.image).numpy() for regions in sources if regions is not None]
        if len(maps) == 2 and np.array_equal(maps[0], maps[1]):  # the oracle's own masks are the pseudo-masks
            maps.pop()
        named: dict[str, np.ndarray] = dict(zip(("regions", "masks"), maps, strict=False))
        for number, groups in enumerate(candidate.stages(sample.image) if candidate.stages else (), start=1):
            named[f"stage{number}"] = groups.numpy()
        for column, regions in named.items():
            columns[column] = panels.colored(regions, panels.REGIONS)
        columns["prediction"] = panels.colored_classes(answer.numpy(), len(classes), None)
        columns["truth"] = panels.colored_classes(sample.label, len(classes), ignore)
        counts, first = ConfusionMatrix(len(classes), ignore), int(benchmark.has_background)
        counts.update(answer, sample.label)
        found = counts.counts.sum(1).nonzero()[:, 0].tolist()
        present = [classes[index] for index in found if index >= first]
        return panels.Look(columns, present, confused(counts, classes, MISTAKES))

    chosen = panels.choose(scored.per_image, config.panels, config.seed)
    panels.draw(folder, chosen, scored.per_image, look, classes, config.panels.side)
