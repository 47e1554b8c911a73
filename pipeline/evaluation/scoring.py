"""One model on one benchmark: thresholds, the test split, oracle labels of the model's regions, and the report.

Axes: height and width in pixels of the stored image. A report holds fractions in [0, 1], no time and no path, so the
same model gives the same bytes. Everything is asked of some images before the next are opened: what a model remembers
of a picture (`pipeline.nn.reading`) then serves every rule, however many pictures there are.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from pipeline.artifacts.files import BadInput
from pipeline.baselines import ClosedVocabulary, LabelModel
from pipeline.datasets.benchmarks import Benchmark, Sample
from pipeline.evaluation.classification import Classification, ImageModel
from pipeline.evaluation.rates import brief, by_split, confused, curve, figures, fraction, uncertainty
from pipeline.evaluation.regions import Regions, RegionScore
from pipeline.inference import (
    BACKGROUNDS,
    BackgroundName,
    Geometry,
    PromptOrder,
    ScoreModel,
    Segmenter,
    class_embeddings,
    threshold_labels,
)
from pipeline.mask_metrics import BoundaryIoU
from pipeline.metrics import ConfusionMatrix, ThresholdSweep

GROUP_INTERVALS = 20  # of a rule by group's thresholds: 0, 0.05 ... 1, so that the papers' are among them
CONFUSION_CLASSES = 32  # a larger matrix is left out of the report, but for its largest mistakes
MISTAKES = 10
# Label maps of images in order.
Answer = Callable[[Sequence[Sample]], Iterator[Int64[Tensor, "_ _"]]]
Watcher = Callable[[Sample, Int64[Tensor, "height width"]], object]  # is told each test image's answer


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """Something to score.

    Attributes:
        name: folder of its metrics: `sseg`, `sseg-untrained`, `baseline-oracle`.
        model: gives class scores, or label maps.
        digests: what its answers depend on beside code, by name.
        regions: its hard masks of an image, at the image's size; None where it has none.
        stages: where it groups in stages, the groups of each, first to last, at the image's size; for the pictures.
        precision: of the products behind its answers, for the report.
    """

    name: str
    model: ScoreModel | LabelModel
    digests: dict[str, str]
    regions: Regions | None
    stages: Callable[[UInt8[np.ndarray, "height width 3"]], list[Int64[Tensor, "height width"]]] | None = None
    precision: str = "float32"


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How to score: the rules of a protocol that hold for this candidate and benchmark.

    Attributes:
        tune_ids: images that choose the threshold; empty to take `threshold`.
        grid: thresholds that are tried, ascending; rules by group have `group_grid`.
    """

    templates: tuple[str, ...]
    prompt_order: PromptOrder
    backgrounds: tuple[BackgroundName, ...]
    threshold: float
    tune_ids: tuple[str, ...]
    grid: tuple[float, ...]
    pamr: bool
    geometry: Geometry
    device: str


@dataclass(slots=True)
class Tally:
    """Counts of a split, and each image's own mIoU and areas (intersection, prediction, truth by class; pixels)."""

    total: ConfusionMatrix
    per_image: dict[str, float] = field(default_factory=dict)
    areas: list[Int64[Tensor, "3 classes"]] = field(default_factory=list)

    @classmethod
    def of(cls, benchmark: Benchmark) -> "Tally":
        """Nothing counted yet."""
        return cls(ConfusionMatrix(len(benchmark.classes), benchmark.ignore_index))

    def add(self, sample: Sample, predicted: Int64[Tensor, "height width"]) -> None:
        """Count an image."""
        single = ConfusionMatrix(self.total.num_classes, self.total.ignore_index)
        single.update(predicted, sample.label)
        self.total.merge(single)
        self.per_image[sample.id] = single.miou()
        self.areas.append(torch.stack([single.counts.diagonal(), single.counts.sum(0), single.counts.sum(1)]))


@dataclass(slots=True)
class Run:
    """A way to answer, what is said of it in the report (once all images were answered), and what was counted."""

    answer: Answer
    described: Callable[[], dict[str, Any]]
    counts: Tally


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A finished score: the report, each test image's own mIoU, how to answer again, test images per second."""

    report: dict[str, Any]
    per_image: dict[str, float]
    answer: Answer
    rate: float


def score(
    candidate: Candidate,
    benchmark: Benchmark,
    ids: list[str],
    settings: Settings,
    step: Callable[[], object],
    watchers: Sequence[Watcher] = (),
) -> Scored:
    """Score a candidate on the test images; `step` is called once per image and answer (see `passes`).

    `watchers` are told the answers that the reported score counts, each once.

    Raises:
        BadInput: every pixel of the images is ignored.
    """
    model = candidate.model
    scores = isinstance(model, ScoreModel)
    runs = _rule_runs(model, benchmark, settings, step) if scores else [_label_run(model, benchmark)]
    boundaries = BoundaryIoU(len(benchmark.classes), benchmark.ignore_index)
    reported: list[Watcher] = [lambda sample, predicted: boundaries.update(predicted, sample.label), *watchers]
    regions = None
    if candidate.regions is not None or scores:
        regions = RegionScore(benchmark, candidate.regions)
        reported.append(regions.update)
    names = _classification(model, benchmark, settings) if isinstance(model, ImageModel) else None
    started = time.perf_counter()
    for samples in benchmark.parts(ids):
        count_answers(samples, runs, step, reported)
        if names is not None:
            names.update(samples)
    rate = len(ids) / max(time.perf_counter() - started, 1e-9)
    first = runs[0]
    if not first.counts.total.counts.any():
        remedy = "Are these the masks of this benchmark? Name images that hold one of its classes"
        raise BadInput(benchmark.split_path("test"), "no pixel of these images counts", remedy)
    beside = {
        "boundary_miou": fraction(boundaries.miou()),
        **(names.report() if names else {}),
        **(regions.report() if regions else {}),
    }
    report = _report(candidate, benchmark, runs) | beside
    return Scored(report=report, per_image=first.counts.per_image, answer=first.answer, rate=rate)


def _report(candidate: Candidate, benchmark: Benchmark, runs: Sequence[Run]) -> dict[str, Any]:
    """What the label maps of the first run say, and of the others in brief."""
    first, *others = runs
    num_images = len(first.counts.areas)
    report = {
        "benchmark": benchmark.name,
        "class_names": list(benchmark.classes),
        "method": candidate.name,
        "num_images": num_images,
        "num_test_images": benchmark.whole(num_images),
        "precision": candidate.precision,
        "protocol": benchmark.protocol,
        **first.described(),
        **figures(first.counts.total, benchmark),
        **by_split(first.counts.total, benchmark),
        **uncertainty(torch.stack(first.counts.areas).numpy()),
        "confused": confused(first.counts.total, benchmark.classes, MISTAKES),
        "other_backgrounds": {
            (said := run.described())["background"]: brief(said, run.counts.total, benchmark) for run in others
        },
    }
    if len(benchmark.classes) <= CONFUSION_CLASSES:
        report["confusion"] = first.counts.total.counts.tolist()
    return report


def count_answers(
    samples: Sequence[Sample], runs: Sequence[Run], step: Callable[[], object], watchers: Sequence[Watcher] = ()
) -> None:
    """Count each run's answers to the images; the watchers are told the first run's."""
    for number, run in enumerate(runs):
        for sample, predicted in zip(samples, run.answer(samples), strict=True):
            run.counts.add(sample, predicted)
            for watcher in () if number else watchers:
                watcher(sample, predicted)
            step()


def passes(candidate: Candidate, num_images: int, settings: Settings) -> int:
    """How often `score` calls `step`."""
    if not isinstance(candidate.model, ScoreModel):
        return num_images
    tuned = sum(BACKGROUNDS[rule].thresholded for rule in settings.backgrounds) * len(settings.tune_ids)
    return num_images * len(settings.backgrounds) + tuned


def _label_run(model: LabelModel, benchmark: Benchmark) -> Run:
    def answer(samples: Sequence[Sample]) -> Iterator[Int64[Tensor, "_ _"]]:
        return (model.label(sample, len(benchmark.classes), benchmark.ignore_index) for sample in samples)

    described = {
        "background": "a class like others",
        "pamr": False,
        "prompt_order": None,
        "resize": None,
        "sweep": None,
        "templates": [],
        "threshold": {"value": None, "chosen_on": "no threshold"},
        "window": None,
        **(model.described() if isinstance(model, ClosedVocabulary) else {}),
    }
    return Run(answer, lambda: described, Tally.of(benchmark))


def _rule_runs(model: ScoreModel, benchmark: Benchmark, settings: Settings, step: Callable[[], object]) -> list[Run]:
    """One for each background rule, its threshold chosen."""
    opened: dict[BackgroundName, tuple[Segmenter, tuple[float, ...], PromptOrder]]
    opened = {rule: open_segmenter(model, benchmark, rule, settings) for rule in settings.backgrounds}
    tuned = {rule: entry[:2] for rule, entry in opened.items() if BACKGROUNDS[rule].thresholded}
    chosen = dict(zip(tuned, choose_thresholds(list(tuned.values()), benchmark, settings, step), strict=True))
    free = {"value": None, "chosen_on": "no threshold"}
    return [
        _rule_run(rule, segmenter, grid, order, chosen.get(rule, free), benchmark, settings)
        for rule, (segmenter, grid, order) in opened.items()
    ]


def _rule_run(
    rule: BackgroundName,
    segmenter: Segmenter,
    grid: tuple[float, ...],
    order: PromptOrder,
    threshold: dict[str, Any],
    benchmark: Benchmark,
    settings: Settings,
) -> Run:
    background = BACKGROUNDS[rule]
    sweep = ThresholdSweep(grid, len(benchmark.classes), benchmark.ignore_index) if background.thresholded else None

    def answer(samples: Sequence[Sample]) -> Iterator[Int64[Tensor, "_ _"]]:
        found = segmenter.many([sample.image for sample in samples])
        for sample, (best, labels) in zip(samples, found, strict=True):
            if sweep is not None:
                sweep.update(best.cpu(), labels.cpu(), sample.label)
            yield threshold_labels(best, labels, threshold["value"]).cpu()

    def described() -> dict[str, Any]:
        return {
            "background": rule,
            "pamr": settings.pamr,
            "prompt_order": order,
            "stuff_words": list(benchmark.stuff if background.stuff_words else ()),
            "sweep": None if sweep is None else curve(sweep),
            "templates": list(settings.templates),
            "threshold": threshold,
            **segmenter.geometry.described(),
        }

    return Run(answer, described, Tally.of(benchmark))


def open_segmenter(
    model: ScoreModel, benchmark: Benchmark, rule: BackgroundName, settings: Settings
) -> tuple[Segmenter, tuple[float, ...], PromptOrder]:
    """The model with the benchmark's words under a background rule, the thresholds to try, the prompts' real order."""
    background = BACKGROUNDS[rule]
    words = (*benchmark.foreground, *(benchmark.stuff if background.stuff_words else ()))
    embeddings, order = class_embeddings(model, words, settings.templates, settings.prompt_order)
    grid = group_grid(settings.threshold) if background.by_group else settings.grid
    segmenter = Segmenter(
        model,
        embeddings.to(settings.device),
        num_foreground=len(benchmark.foreground),
        has_background=benchmark.has_background,
        geometry=settings.geometry,
        background=background,
        device=settings.device,
        thresholds=grid,
        pamr=settings.pamr,
    )
    return segmenter, grid, order


def group_grid(threshold: float) -> tuple[float, ...]:
    """Thresholds of a rule by group, ascending: each costs a channel, so they are few; the given one is among them."""
    return tuple(sorted({*(index / GROUP_INTERVALS for index in range(GROUP_INTERVALS + 1)), threshold}))


def choose_thresholds(
    opened: Sequence[tuple[Segmenter, tuple[float, ...]]],
    benchmark: Benchmark,
    settings: Settings,
    step: Callable[[], object],
) -> list[dict[str, Any]]:
    """Each segmenter's threshold and where it comes from: the best of its grid on the tune images, the parameter where
    there are none."""
    if not settings.tune_ids:
        return [{"value": settings.threshold, "chosen_on": "params.yaml"} for _ in opened]
    sweeps = [ThresholdSweep(grid, len(benchmark.classes), benchmark.ignore_index) for _, grid in opened]
    for samples in benchmark.parts(settings.tune_ids) if opened else ():
        for (segmenter, _), sweep in zip(opened, sweeps, strict=True):
            for sample, (best, labels) in zip(samples, segmenter.many([s.image for s in samples]), strict=True):
                sweep.update(best.cpu(), labels.cpu(), sample.label)
                step()
    chosen_on = f"{benchmark.layout['tune']} split, {len(settings.tune_ids)} images"
    best = [sweep.best() for sweep in sweeps]
    return [{"value": value, "chosen_on": chosen_on, "tune_miou": fraction(miou)} for value, miou in best]


def _classification(model: ImageModel, benchmark: Benchmark, settings: Settings) -> Classification:
    embeddings, _ = class_embeddings(model, benchmark.foreground, settings.templates, settings.prompt_order)
    return Classification(model, benchmark, embeddings.to(settings.device), settings.geometry, settings.device)
