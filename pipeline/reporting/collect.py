"""What the stages left under `reports/`, read and checked: scores, seeds, training curves, panels.

Percentages: a metrics file holds fractions in [0, 1]; a `Score` holds percent, as papers print them.
"""

import csv
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.artifacts.files import BadInput
from pipeline.reporting.labels import KINDS, clean, kind

REMEDY = "Delete it and run `dvc repro` to make it again"
PERCENT = 100.0
Seeds = dict[str, dict[str, dict[str, list[float]]]]  # by method, benchmark and metric: a value per seed, percent
SETTINGS = (
    *("protocol", "templates", "prompt_order", "resize", "window", "background", "pamr", "precision"),
    *("constant_label", "num_test_images", "model_digest", "learned_from"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A background rule's result, in percent; `best_swept` is what the best threshold for the test images gives."""

    name: str
    miou: float | None
    fg_accuracy: float | None
    threshold: float | None
    best_swept: float | None


# Standard errors that a difference must exceed; Source: the normal distribution's 97.5th percentile.
SURE = 1.96


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One method on one benchmark; percentages in [0, 100], None where the method has no such figure.

    Attributes:
        per_class: IoU by class name; None for a class that neither masks nor predictions contain.
        constant: mIoU of the best single label, the floor that any threshold reaches.
        interval: of 95 percent around `miou`, by a bootstrap over the images; `error` its standard error in points.
        boundary: mIoU of the boundaries' bands. jaccard: mask probing, the best region's IoU with each object.
        image_accuracy: zero-shot classification of the images that show one class.
        oracle: mIoU when each region takes the majority label of the true masks.
        threshold: background threshold, and `chosen_on` the images it was chosen on.
        sweep: (threshold, mIoU) on the test images, for looking only; `best_swept` is the highest.
        others: the same model under other background rules.
        confusion: pixels by true class (rows) and answer, in the order of `per_class`; None where it was not kept.
        confused: the largest mistakes: true class, answer, percent of the true class's pixels.
        splits: mIoU over some classes and over all others, by the split's name.
        settings: what else fixes the number, as the metrics file holds it; see `SETTINGS`.
    """

    method: str
    benchmark: str
    miou: float
    per_class: dict[str, float | None]
    aacc: float | None
    macc: float | None
    fg_accuracy: float | None
    image_accuracy: float | None
    interval: tuple[float, float] | None
    error: float | None
    boundary: float | None
    jaccard: float | None
    oracle: float | None
    oracle_best: float | None
    constant: float | None
    threshold: float | None
    chosen_on: str
    num_images: int | None
    sweep: list[tuple[float, float]]
    best_swept: float | None
    others: list[Rule]
    confusion: list[list[int]] | None
    confused: list[tuple[str, str, float]]
    splits: dict[str, tuple[float | None, float | None]]
    settings: dict[str, Any]

    def apart(self, other: "Score") -> bool | None:
        """Whether two scores on the same images differ by more than chance (95 percent); None where it is not known.

        The images' shared luck is not taken off, so that the answer errs towards no.
        """
        if self.error is None or other.error is None:
            return None
        return abs(self.miou - other.miou) > SURE * math.hypot(self.error, other.error)

    @property
    def rank(self) -> tuple[int, float, str]:
        """Sort key: kinds in the order of `KINDS`, the best first."""
        return list(KINDS).index(kind(self.method)), -self.miou, self.method


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A training run: one value per logged step and term.

    Attributes:
        run: the file's name.
        images: images seen at each row.
        terms: values by column, in the file's order, aligned with `images`; NaN where a cell is not a number.
    """

    run: str
    images: list[float]
    terms: dict[str, list[float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class PanelSet:
    """Pictures of one method on one benchmark: `panels.json` beside its PNG files."""

    method: str
    benchmark: str
    folder: Path
    classes: list[str]
    colors: dict[str, tuple[int, int, int]]
    panels: list[dict[str, Any]]


@dataclass(kw_only=True, slots=True)
class Findings:
    """Everything under `reports/` that a page shows; `notes` say what could not be read and why."""

    scores: list[Score] = field(default_factory=list)
    seeds: Seeds = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    panels: list[PanelSet] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_score(method: str, benchmark: str, text: str, file: Path | str) -> Score:
    """One metrics file's text as a `Score`.

    Raises:
        BadInput: not JSON, a key is absent, or a figure lies outside [0, 1]; names the file and the remedy.
    """
    try:
        return _score(method, benchmark, json.loads(text))
    except json.JSONDecodeError as error:
        raise BadInput(file, f"not JSON ({error})", REMEDY) from error
    except KeyError as error:
        raise BadInput(file, f"not a metrics file: no {error}", REMEDY) from error
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(file, f"not a metrics file: {error}", REMEDY) from error


def _score(method: str, benchmark: str, values: dict[str, Any]) -> Score:
    names, per_class, threshold = values["class_names"], values["per_class"], values.get("threshold") or {}
    sweep = values.get("sweep") or {}
    swept = zip(sweep.get("thresholds") or [], sweep.get("miou") or [], strict=True)
    others = values.get("other_backgrounds") or {}
    return Score(
        method=method,
        benchmark=benchmark,
        miou=_required(values["miou"]),
        per_class={clean(name): _percent(per_class.get(name)) for name in names},
        aacc=_percent(values.get("aacc")),
        macc=_percent(values.get("macc")),
        fg_accuracy=_percent(values.get("fg_accuracy")),
        image_accuracy=_percent(values.get("image_accuracy")),
        interval=None if values.get("miou_interval") is None else _pair(values["miou_interval"]),
        error=_percent(values.get("miou_error")),
        boundary=_percent(values.get("boundary_miou")),
        jaccard=_percent(values.get("mask_jaccard")),
        oracle=_percent(values.get("oracle_majority")),
        oracle_best=_percent(values.get("oracle_best_iou")),
        constant=_percent(values.get("constant_miou")),
        threshold=_value(threshold),
        chosen_on=clean(threshold.get("chosen_on") or "") if _value(threshold) is not None else "",
        num_images=None if values.get("num_images") is None else int(values["num_images"]),
        sweep=[(float(x), _required(y)) for x, y in swept if y is not None],
        best_swept=_percent(sweep.get("best_miou")),
        others=[_rule(name, rule) for name, rule in sorted(others.items())],
        confusion=_matrix(values.get("confusion"), len(names)),
        confused=[
            (clean(item["truth"]), clean(item["answer"]), _required(item["of_truth"]))
            for item in values.get("confused") or []
        ],
        splits={
            clean(name): (_percent(split["miou"]), _percent(split["others_miou"]))
            for name, split in values.get("splits", {}).items()
        },
        settings={key: values.get(key) for key in SETTINGS},
    )


def _rule(name: str, values: dict[str, Any]) -> Rule:
    return Rule(
        name=clean(name),
        miou=_percent(values.get("miou")),
        fg_accuracy=_percent(values.get("fg_accuracy")),
        threshold=_value(values.get("threshold") or {}),
        best_swept=_percent((values.get("sweep") or {}).get("best_miou")),
    )


def _value(threshold: dict[str, Any]) -> float | None:
    return None if threshold.get("value") is None else float(threshold["value"])


def _percent(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"expected a fraction in [0, 1], found {value!r}")
    return PERCENT * value


def _matrix(values: Any, size: int) -> list[list[int]] | None:
    if values is None:
        return None
    rows = [[int(value) for value in row] for row in values]
    if len(rows) != size or any(len(row) != size or min(row) < 0 for row in rows):
        raise ValueError(f"confusion is no {size} x {size} matrix of counts")
    return rows


def _pair(values: Any) -> tuple[float, float]:
    low, high = values
    return _required(low), _required(high)


def _required(value: Any) -> float:
    percent = _percent(value)
    if percent is None:
        raise ValueError("miou is null")
    return percent


def mious(scores: list[Score]) -> dict[str, dict[str, float]]:
    """mIoU in percent by method and benchmark: few enough numbers for `dvc exp show` to put side by side."""
    found: dict[str, dict[str, float]] = {}
    for score in scores:
        found.setdefault(score.method, {})[score.benchmark] = score.miou
    return found


def read_scores(folder: Path) -> list[Score]:
    """All `<method>/<benchmark>.json` below `folder`, by benchmark, then kind, then mIoU.

    Raises:
        BadInput: a file is not a metrics file.
    """
    scores = []
    for path in sorted(folder.glob("*/*.json")):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(path, f"not UTF-8 ({error.reason})", REMEDY) from error
        scores.append(read_score(path.parent.name, path.stem, text, path))
    return sorted(scores, key=lambda score: (score.benchmark, score.rank))


def read_seeds(path: Path) -> Seeds:
    """Figures in percent of each seed, by method, benchmark and metric; empty where the file is absent.

    Raises:
        BadInput: the file is there and is not `{method: {benchmark: {"miou": [...]}}}`.
    """
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return {
            method: {
                name: {"miou": [], **{metric: [_required(v) for v in each] for metric, each in sorted(entry.items())}}
                for name, entry in sorted(benchmarks.items())
            }
            for method, benchmarks in sorted(values.items())
        }
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(path, f"not a table of seeds: {error}", REMEDY) from error


def read_curve(path: Path) -> Curve:
    """A training curve; every column but `step` and `images` is a term.

    Raises:
        ValueError: no header with `step` and `images`, or a row of another length.
    """
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    header = rows[0] if rows else []
    if "images" not in header or "step" not in header:
        raise ValueError("no columns `step` and `images`")
    if any(len(row) != len(header) for row in rows[1:]):
        raise ValueError("a row has another number of cells than the header")
    columns = {name: [_number(row[i]) for row in rows[1:]] for i, name in enumerate(header)}
    images = columns.pop("images")
    columns.pop("step")
    return Curve(run=path.stem, images=images, terms=columns)


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def read_panels(folder: Path) -> PanelSet:
    """The panels of one method on one benchmark, `folder` being `<method>/<benchmark>`.

    Raises:
        ValueError, KeyError, TypeError: `panels.json` is not what `PanelSet` describes.
    """
    values = json.loads((folder / "panels.json").read_text(encoding="utf-8"))
    colors = {}
    for name, (red, green, blue) in values["colors"].items():
        colors[clean(name)] = tuple(min(255, max(0, int(channel))) for channel in (red, green, blue))
    return PanelSet(
        method=folder.parent.name,
        benchmark=folder.name,
        folder=folder,
        classes=[clean(name) for name in values["classes"]],
        colors=colors,
        panels=[
            {**panel, "present": [clean(name) for name in panel.get("present") or []]} for panel in values["panels"]
        ],
    )


def collect(*, metrics: Path, seeds: Path, curves: Path, figures: Path) -> Findings:
    """Read all there is; a curve or a panel that cannot be read becomes a note.

    Raises:
        BadInput: a metrics or seeds file is corrupt; a table with a method silently missing would mislead.
    """
    findings = Findings(scores=read_scores(metrics), seeds=read_seeds(seeds))
    for path in sorted(curves.rglob("*.csv")):
        try:
            findings.curves.append(read_curve(path))
        except (ValueError, UnicodeDecodeError, csv.Error) as error:
            findings.notes.append(f"Training curve {path.name} is not shown: {error}. {REMEDY}.")
    for path in sorted(figures.glob("*/*/panels.json")):
        try:
            findings.panels.append(read_panels(path.parent))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            name = path.relative_to(figures).as_posix()
            findings.notes.append(f"Panels {name} are not shown: {type(error).__name__} {error}. {REMEDY}.")
    return findings
