"""A model that knows a list of labels and answers for whole photographs.

Axes: height and width in pixels of the photograph.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import Float32, Int64, UInt8

from pipeline.artifacts.files import BadInput, read_json
from pipeline.baselines import ClosedVocabulary
from pipeline.datasets.benchmarks import Benchmark, check_class_names, open_benchmark
from pipeline.evaluation import candidates
from pipeline.evaluation.config import BenchmarkConfig, Config, pick
from pipeline.evaluation.pairs import benchmark_root
from pipeline.evaluation.scoring import Candidate
from pipeline.inference import BACKGROUNDS, BackgroundName, ScoreModel, Segmenter, class_embeddings, threshold_labels
from pipeline.params import ParamsError
from pipeline.prediction.drawing import BACKGROUND
from pipeline.project import Project
from pipeline.text.prompts import TemplateSet, templates


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What is asked for instead of what the parameters say; None leaves it to them.

    Attributes:
        background: rule for background.
        threshold: best score below which a pixel is background.
        stuff: words that are background, for the rules with extra vocabulary.
        templates: sentences that a label is put in.
    """

    background: BackgroundName | None = None
    threshold: float | None = None
    stuff: tuple[str, ...] | None = None
    templates: TemplateSet | None = None


@dataclass(frozen=True, slots=True)
class Prediction:
    """ids: 0 is background, i the i-th label. scores: of the best label, [0, 1]; None for a model that gives labels
    alone."""

    ids: Int64[np.ndarray, "height width"]
    scores: Float32[np.ndarray, "height width"] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Neighbouring pixels (eight directions) of one label.

    Attributes:
        box: left, top, right and bottom, the latter two exclusive.
        score: mean of the pixels' scores.
    """

    label: str
    pixels: int
    share: float
    box: tuple[int, int, int, int]
    score: float | None


def read_labels(text: str, option: str) -> tuple[str, ...]:
    """Names with commas between them, or the lines of a text file (a path that ends in .txt).

    Raises:
        BadInput: the file is unreadable.
        ParamsError: an empty name, or one that stands twice.
    """
    names, where = text.split(","), option
    if text.endswith(".txt"):
        where = f"{option} {text}"
        try:
            names = Path(text).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(Path(text), str(error), "Give a UTF-8 text file with a label per line") from error
    try:
        return check_class_names(names, where)
    except ValueError as error:
        raise ParamsError(str(error)) from None


class Predictor:
    """Text vectors of the labels are made once, whatever the number of photographs.

    `note` says how background is decided.

    Raises:
        BadInput: a model's file is absent or broken.
        ParamsError: a model that reads no labels, or knows others; an option that it has no use for.
    """

    def __init__(
        self,
        spec: str,
        candidate: Candidate,
        labels: tuple[str, ...],
        options: Options,
        config: Config,
        project: Project,
    ) -> None:
        if BACKGROUND in labels:
            raise ParamsError(f"--labels: {BACKGROUND!r} is what remains, not a label; leave it out")
        self.labels, model = labels, candidate.model
        if isinstance(model, ClosedVocabulary):
            self._answer = _ClosedAnswer(candidate.name, model, labels, options)
        elif isinstance(model, ScoreModel):
            method = candidates.rules_name(spec, project)
            self._answer = _NamedAnswer(candidate, model, method, labels, options, config, project)
        else:
            raise ParamsError(f"--model: {candidate.name} does not read labels; choose a model that does")
        self.note = self._answer.note

    def __call__(self, image: UInt8[np.ndarray, "height width 3"]) -> Prediction:
        """The label of every pixel."""
        return self._answer(image)

    def segments(self, found: Prediction) -> list[Segment]:
        """Every segment of a label, the largest first; background has none."""
        rows = []
        for index in np.unique(found.ids[found.ids > 0]):
            mask = (found.ids == index).astype(np.uint8)
            count, parts, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
            flat = parts.ravel()
            sums = None if found.scores is None else np.bincount(flat, found.scores.ravel(), minlength=count)
            for part in range(1, count):
                left, top, width, height, pixels = (int(value) for value in stats[part])
                rows.append(
                    Segment(
                        label=self.labels[index - 1],
                        pixels=pixels,
                        share=pixels / mask.size,
                        box=(left, top, left + width, top + height),
                        score=None if sums is None else float(sums[part] / pixels),
                    )
                )
        return sorted(rows, key=lambda row: (-row.pixels, row.label, row.box))


class _ClosedAnswer:
    """Of a model that learned one class list."""

    note = "Background: a class that it has learned"

    def __init__(self, name: str, model: ClosedVocabulary, labels: tuple[str, ...], options: Options) -> None:
        self._model, self._ids = model, _closed_ids(name, model, labels, options)

    def __call__(self, image: UInt8[np.ndarray, "height width 3"]) -> Prediction:
        return Prediction(self._ids[self._model.answer(image).numpy()], None)


class _NamedAnswer:
    """Of a model that reads the labels, under the rules of `method` for the first benchmark."""

    def __init__(
        self,
        candidate: Candidate,
        model: ScoreModel,
        method: str,
        labels: tuple[str, ...],
        options: Options,
        config: Config,
        project: Project,
    ) -> None:
        rules, first = config.rules(config.protocol), first_entry(config).name
        name: BackgroundName = options.background or pick(rules.backgrounds, method, first)[0]
        rule = BACKGROUNDS[name]
        _refuse_unused(options, name)
        stuff = _stuff(options, labels, config, project) if rule.stuff_words else ()
        sentences = templates(options.templates or pick(rules.templates, method, first))
        self._threshold, limit = None, ""
        if rule.thresholded:
            self._threshold, source = _threshold(options, candidate, method, name, config, project)
            limit = f", threshold {self._threshold:g} ({source})"
        self.note = f"Background: {name}, {len(stuff)} words{limit}"
        order = pick(rules.prompt_order, method, first)
        embeddings, _ = class_embeddings(model, (*labels, *stuff), sentences, order)
        self._segmenter = Segmenter(
            model,
            embeddings.to(project.machine.device),
            num_foreground=len(labels),
            has_background=True,
            geometry=config.geometry,
            background=rule,
            device=project.machine.device,
            thresholds=() if self._threshold is None else (self._threshold,),
            pamr=rules.pamr,
        )

    def __call__(self, image: UInt8[np.ndarray, "height width 3"]) -> Prediction:
        found = self._segmenter.with_scores(image)
        kept = threshold_labels(found.compared, found.label_ids, self._threshold)
        return Prediction(kept.cpu().numpy(), found.best.float().cpu().numpy())


def _closed_ids(
    name: str, model: ClosedVocabulary, labels: tuple[str, ...], options: Options
) -> Int64[np.ndarray, " classes"]:
    """The id of each class of a model that knows one list, which the labels must be, in any order."""
    known = tuple(word for word in model.classes if word != BACKGROUND)
    if sorted(known) != sorted(labels):
        raise ParamsError(f"--labels: {name} knows one class list and no other: {','.join(known)}")
    for option in ("background", "threshold", "stuff"):
        if getattr(options, option) is not None:
            raise ParamsError(f"--{option}: background is a class that {name} has learned; leave it out")
    if options.templates is not None:
        raise ParamsError(f"--templates: {name} reads no text; leave it out")
    return np.array([0 if word == BACKGROUND else 1 + labels.index(word) for word in model.classes])


def _refuse_unused(options: Options, name: BackgroundName) -> None:
    """Raise ParamsError for an option that the rule for background does not read."""
    rule = BACKGROUNDS[name]
    for option, used in (("threshold", rule.thresholded), ("stuff", rule.stuff_words)):
        if getattr(options, option) is not None and not used:
            problem = f"the rule for background is {name}, which has no use for it"
            raise ParamsError(f"--{option}: {problem}; leave it out, or choose another --background")


def first_entry(config: Config) -> BenchmarkConfig:
    """The first benchmark in the parameters, whose rules hold for any photograph.

    Raises:
        ParamsError: there is none.
    """
    if not config.benchmarks:
        raise ParamsError("evaluate.benchmarks: expected one or more, whose first one's rules hold; found none")
    return config.benchmarks[0]


def first_benchmark(config: Config, project: Project) -> Benchmark:
    """The first benchmark in the parameters, opened.

    Raises:
        BadInput: its files are absent or broken. ParamsError: there is none.
    """
    entry = first_entry(config)
    return open_benchmark(entry.name, benchmark_root(project, entry.name, entry.root), config.protocol)


def _stuff(options: Options, labels: tuple[str, ...], config: Config, project: Project) -> tuple[str, ...]:
    """Background words that are no label: the option's, or those of the first benchmark."""
    words = first_benchmark(config, project).stuff if options.stuff is None else options.stuff
    asked = {label.casefold() for label in labels}
    return tuple(word for word in words if word.casefold() not in asked)


def _threshold(
    options: Options, candidate: Candidate, method: str, rule: BackgroundName, config: Config, project: Project
) -> tuple[float, str]:
    """The threshold and its source: the option, the one that this model's evaluation chose, or the parameter."""
    if options.threshold is not None:
        return options.threshold, "--threshold"
    benchmark = config.benchmarks[0].name
    path = project.root / "reports" / "metrics" / candidate.name / f"{benchmark}.json"
    if path.is_file():
        report = read_json(path, "Run `dvc repro evaluate`")
        scored = report if report["background"] == rule else report["other_backgrounds"].get(rule)
        if scored and report["digests"] == candidate.digests:
            return scored["threshold"]["value"], f"{benchmark}: {scored['threshold']['chosen_on']}"
    return pick(config.rules(config.protocol).thresholds, method, benchmark), "params.yaml"
