"""One model on one benchmark: thresholds, the test split, oracle labels of the model's regions, and the report.

Axes: height and width in pixels of the stored image. A report holds fractions in [0, 1], no time and no path, so the
same model gives the same bytes.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from pipeline.baselines import ClosedVocabulary, LabelModel
from pipeline.datasets.benchmarks import Benchmark, Sample
from pipeline.evaluation.classification import ImageModel, classify
from pipeline.evaluation.rates import brief, by_split, confused, curve, figures, fraction, uncertainty
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
from pipeline.mask_metrics import BoundaryIoU, best_jaccard
from pipeline.metrics import ConfusionMatrix, ThresholdSweep, oracle_classes, region_counts

GROUP_INTERVALS = 20  # of a rule by group's thresholds: 0, 0.05 ... 1, so that the papers' are among them
CONFUSION_CLASSES = 32  # a larger matrix is left out of the report, but for its largest mistakes
MISTAKES = 10
# Label maps of images in order.
Answer = Callable[[Sequence[Sample]], Iterator[Int64[Tensor, "_ _"]]]
Regions = Callable[[UInt8[np.ndarray, "height width 3"]], Int64[Tensor, "height width"]]
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
    """

    name: str
    model: ScoreModel | LabelModel
    digests: dict[str, str]
    regions: Regions | None
    stages: Callable[[UInt8[np.ndarray, "height width 3"]], list[Int64[Tensor, "height width"]]] | None = None


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
    """Counts of a split, and each image's own mIoU and areas (intersection, prediction, truth by class; pixels).

    `seconds` is what it took.
    """

    total: ConfusionMatrix
    per_image: dict[str, float] = field(default_factory=dict)
    areas: list[Int64[Tensor, "3 classes"]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A finished score: the report, each test image's own mIoU, how to answer again, test images per second."""

    report: dict[str, Any]
    per_image: dict[str, float]
    answer: Answer
    rate: float


def tally(
    benchmark: Benchmark,
    ids: list[str],
    answer: Answer,
    step: Callable[[], object],
    watchers: Sequence[Watcher] = (),
) -> Tally:
    """Confusion counts of `answer` over the images, in order; each watcher is told every answer."""
    classes, ignore = len(benchmark.classes), benchmark.ignore_index
    counts = Tally(ConfusionMatrix(classes, ignore))
    started = time.perf_counter()
    for samples in benchmark.parts(ids):
        for sample, predicted in zip(samples, answer(samples), strict=True):
            single = ConfusionMatrix(classes, ignore)
            single.update(predicted, sample.label)
            counts.total.merge(single)
            for watcher in watchers:
                watcher(sample, predicted)
            counts.per_image[sample.id] = single.miou()
            counts.areas.append(torch.stack([single.counts.diagonal(), single.counts.sum(0), single.counts.sum(1)]))
            step()
    counts.seconds = time.perf_counter() - started
    return counts


def score(
    candidate: Candidate,
    benchmark: Benchmark,
    ids: list[str],
    settings: Settings,
    step: Callable[[], object],
    watchers: Sequence[Watcher] = (),
) -> Scored:
    """Score a candidate on the test images; `step` is called once per image and pass (see `passes`).

    `watchers` are told the answers that the reported score counts, each once.
    """
    boundaries = BoundaryIoU(len(benchmark.classes), benchmark.ignore_index)
    reported = (lambda sample, predicted: boundaries.update(predicted, sample.label), *watchers)
    if isinstance(candidate.model, ScoreModel):
        runs = [
            _run_rule(candidate.model, benchmark, ids, rule, settings, step, () if number else reported)
            for number, rule in enumerate(settings.backgrounds)
        ]
    else:
        runs = [_run_labels(candidate.model, benchmark, ids, step, reported)]
    headline, counts, answer = runs[0]
    report = {
        "benchmark": benchmark.name,
        "class_names": list(benchmark.classes),
        "method": candidate.name,
        "num_images": len(ids),
        "num_test_images": benchmark.whole(len(ids)),
        "precision": "float32",
        "protocol": benchmark.protocol,
        **headline,
        **figures(counts.total, benchmark),
        **by_split(counts.total, benchmark),
        "boundary_miou": fraction(boundaries.miou()),
        **uncertainty(torch.stack(counts.areas).numpy()),
        **_image_accuracy(candidate.model, benchmark, ids, settings, step),
        **oracle(candidate, benchmark, ids, answer, step),
        "confused": confused(counts.total, benchmark.classes, MISTAKES),
        "other_backgrounds": {rule["background"]: brief(rule, run.total, benchmark) for rule, run, _ in runs[1:]},
    }
    if len(benchmark.classes) <= CONFUSION_CLASSES:
        report["confusion"] = counts.total.counts.tolist()
    rate = len(ids) / max(counts.seconds, 1e-9)
    return Scored(report=report, per_image=counts.per_image, answer=answer, rate=rate)


def passes(candidate: Candidate, num_images: int, settings: Settings) -> int:
    """How often `score` calls `step`."""
    if not isinstance(candidate.model, ScoreModel):
        return num_images * (1 + (candidate.regions is not None))
    tuned = sum(BACKGROUNDS[rule].thresholded for rule in settings.backgrounds) * len(settings.tune_ids)
    return num_images * (len(settings.backgrounds) + isinstance(candidate.model, ImageModel) + 1) + tuned


def _run_labels(
    model: LabelModel,
    benchmark: Benchmark,
    ids: list[str],
    step: Callable[[], object],
    watchers: Sequence[Watcher],
) -> tuple[dict[str, Any], Tally, Answer]:
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
    return described, tally(benchmark, ids, answer, step, watchers), answer


def _run_rule(
    model: ScoreModel,
    benchmark: Benchmark,
    ids: list[str],
    rule: BackgroundName,
    settings: Settings,
    step: Callable[[], object],
    watchers: Sequence[Watcher],
) -> tuple[dict[str, Any], Tally, Answer]:
    """One background rule on the test split: what was done, the counts, and how to answer for one image."""
    background = BACKGROUNDS[rule]
    segmenter, grid, order = open_segmenter(model, benchmark, rule, settings)
    threshold = {"value": None, "chosen_on": "no threshold"}
    sweep = None
    if background.thresholded:
        threshold = choose_threshold(segmenter, benchmark, settings, grid, step)
        sweep = ThresholdSweep(grid, len(benchmark.classes), benchmark.ignore_index)

    def answer(samples: Sequence[Sample]) -> Iterator[Int64[Tensor, "_ _"]]:
        found = segmenter.many([sample.image for sample in samples])
        for sample, (best, labels) in zip(samples, found, strict=True):
            if sweep is not None:
                sweep.update(best.cpu(), labels.cpu(), sample.label)
            yield threshold_labels(best, labels, threshold["value"]).cpu()

    counts = tally(benchmark, ids, answer, step, watchers)
    described = {
        "background": rule,
        "pamr": settings.pamr,
        "prompt_order": order,
        "stuff_words": list(benchmark.stuff if background.stuff_words else ()),
        "sweep": None if sweep is None else curve(sweep),
        "templates": list(settings.templates),
        "threshold": threshold,
        **settings.geometry.described(),
    }
    return described, counts, answer


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


def choose_threshold(
    segmenter: Segmenter,
    benchmark: Benchmark,
    settings: Settings,
    grid: tuple[float, ...],
    step: Callable[[], object],
) -> dict[str, Any]:
    """The threshold and where it comes from: the grid's best on the tune images, the parameter where there are none."""
    if not settings.tune_ids:
        return {"value": settings.threshold, "chosen_on": "params.yaml"}
    sweep = ThresholdSweep(grid, len(benchmark.classes), benchmark.ignore_index)
    for samples in benchmark.parts(settings.tune_ids):
        for sample, (best, labels) in zip(samples, segmenter.many([s.image for s in samples]), strict=True):
            sweep.update(best.cpu(), labels.cpu(), sample.label)
            step()
    value, miou = sweep.best()
    chosen_on = f"{benchmark.layout['tune']} split, {len(settings.tune_ids)} images"
    return {"value": value, "chosen_on": chosen_on, "tune_miou": fraction(miou)}


def oracle(
    candidate: Candidate, benchmark: Benchmark, ids: list[str], answer: Answer, step: Callable[[], object]
) -> dict[str, float | None]:
    """mIoU when the truth names each of the candidate's regions, by majority and by best IoU; and mask probing."""
    regions = _regions(candidate, answer)
    if regions is None:
        return {}
    classes, ignore = len(benchmark.classes), benchmark.ignore_index
    majority, best_iou = ConfusionMatrix(classes, ignore), ConfusionMatrix(classes, ignore)
    num_regions, jaccards = 0, []
    for samples in benchmark.parts(ids):
        for sample, found in zip(samples, regions(samples), strict=True):
            counts = region_counts(found, torch.tensor(sample.label), classes, ignore)
            majority.add_regions(counts, oracle_classes(counts, "majority"))
            best_iou.add_regions(counts, oracle_classes(counts, "best_iou"))
            num_regions += int((counts.sum(1) > 0).sum())
            jaccards.append(best_jaccard(counts, benchmark.has_background))
            step()
    return {
        "mask_jaccard": fraction(torch.tensor(jaccards).nanmean().item()),
        "num_regions": round(num_regions / max(len(ids), 1), 2),
        "oracle_best_iou": fraction(best_iou.miou()),
        "oracle_majority": fraction(majority.miou()),
    }


def _regions(candidate: Candidate, answer: Answer) -> Answer | None:
    """The candidate's own regions; those of a model that does not group pixels are the classes that it predicts.

    Source: card scg.md section 9 (MaskCLIP in SCG's Table 1).
    """
    grouped = candidate.regions
    if grouped is not None:
        return lambda samples: (grouped(sample.image) for sample in samples)
    return answer if isinstance(candidate.model, ScoreModel) else None


def _image_accuracy(
    model: ScoreModel | LabelModel,
    benchmark: Benchmark,
    ids: list[str],
    settings: Settings,
    step: Callable[[], object],
) -> dict[str, Any]:
    """Zero-shot classification by a model that has a vector of the whole image."""
    if not isinstance(model, ImageModel):
        return {}
    embeddings, _ = class_embeddings(model, benchmark.foreground, settings.templates, settings.prompt_order)
    side, device = settings.geometry.window or settings.geometry.short_side, settings.device
    return classify(model, benchmark, ids, embeddings.to(device), side, device, step)
