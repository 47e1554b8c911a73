"""Params block `evaluate`: what is scored, on what, and under which protocol."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, TypeVar

from pipeline.datasets.benchmarks import Protocol
from pipeline.inference import BackgroundName, Geometry, PromptOrder
from pipeline.params import ParamsError, Range
from pipeline.text.prompts import TemplateSet

T = TypeVar("T")
DEFAULT = "default"


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkConfig:
    """One benchmark of the evaluate stage.

    Attributes:
        name: a data file of pipeline/datasets/classes.
        root: folder that holds its layout; `scenes` stands for the set that the scenes stage wrote.
        limit: first test images that count; None for all of them.
        tune_limit: first images of the tune split that choose the threshold; None for all of them.
    """

    name: str
    root: str
    limit: Annotated[int, Range(1)] | None
    tune_limit: Annotated[int, Range(1)] | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """One protocol: prompts and background. Source: evaluation card sections 4, 6 and 9.

    All but `pamr` are mappings, read at the most special of their keys `<method>/<benchmark>`, `<method>`,
    `<benchmark>`, `default`, where a method is named as its metrics folder: `sseg`, `sseg-untrained`,
    `baseline-clip_patches`. What no key names goes by the part of its name before the last hyphen: `sseg-untrained`
    has the rules of `sseg`.

    Attributes:
        templates: template set.
        prompt_order: averaging over templates before or after normalising.
        backgrounds: background rules; the first gives the reported score, the others stand beside it.
        thresholds: score below which a pixel is background, where the rule has a threshold.
        tune: whether the threshold is chosen on the benchmark's tune split instead, where there is one.
        pamr: refine each window's scores by the picture's edges; not for rules by group. Source: card section 9.
    """

    templates: dict[str, TemplateSet]
    prompt_order: dict[str, PromptOrder]
    backgrounds: dict[str, tuple[BackgroundName, ...]]
    thresholds: dict[str, Annotated[float, Range(0, 1)]]
    tune: dict[str, bool]
    pamr: bool

    def __post_init__(self) -> None:
        for name in ("templates", "prompt_order", "backgrounds", "thresholds", "tune"):
            if DEFAULT not in getattr(self, name):
                raise ParamsError(f"evaluate: {name}.{DEFAULT}: missing key")
        for key, rules in self.backgrounds.items():
            if not rules or len(set(rules)) != len(rules):
                raise ParamsError(f"evaluate: backgrounds.{key}: expected one or more different rules")


@dataclass(frozen=True, kw_only=True, slots=True)
class PanelConfig:
    """Pictures for the report.

    Attributes:
        seeded: images drawn at random, the same for every method.
        best, worst: how many of the others with the highest mIoU of their own, and with the lowest.
        side: longer side to which pictures are reduced, pixels.
    """

    seeded: Annotated[int, Range(0)]
    best: Annotated[int, Range(0)]
    worst: Annotated[int, Range(0)]
    side: Annotated[int, Range(16)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """Params block `evaluate`.

    Attributes:
        seed: draws the panels' images.
        protocol: which of the two blocks below holds.
        models: `<method>` (models/<method>), `untrained:<method>`, `baseline:<name>`, `selftrained:<teacher>`,
            `transfer:<encoder>`.
        benchmarks: what the stage scores them on.
        geometry: how an image reaches a model.
        native: the papers' own rules, thresholds per data set.
        unified: TCL's names and prompts, and one threshold for every set. Deviates: it is compared with the highest
            softmax probability, TCL's with a sigmoid per class, which group models and mixtures do not have (see
            `Segmenter`). How strict it is then depends on the number of classes.
        sweep_step: grid of thresholds that are tried.
        panels: pictures.
    """

    seed: int
    protocol: Protocol
    models: tuple[str, ...]
    benchmarks: tuple[BenchmarkConfig, ...]
    geometry: Geometry
    native: Rules
    unified: Rules
    sweep_step: Annotated[float, Range(0.0001, 0.5)]
    panels: PanelConfig

    def __post_init__(self) -> None:
        for name, values in (("models", self.models), ("benchmarks", tuple(b.name for b in self.benchmarks))):
            repeated = [value for value in values if values.count(value) > 1]
            if repeated:
                raise ParamsError(f"evaluate.{name}: {repeated[0]!r} stands twice")

    def rules(self, protocol: Protocol) -> Rules:
        """The block of a protocol."""
        return self.native if protocol == "native" else self.unified


def pick(values: Mapping[str, T], method: str, benchmark: str) -> T:
    """The value at the most special key that is there; see `Rules`."""
    parts = method.split("-")
    names = ["-".join(parts[:count]) for count in range(len(parts), 0, -1)]
    keys = [*(key for name in names for key in (f"{name}/{benchmark}", name)), benchmark, DEFAULT]
    return next(values[key] for key in keys if key in values)


def thresholds(step: float) -> list[float]:
    """The grid from 0 (no background) to 1, at most `step` apart."""
    count = math.ceil(1 / step - 1e-9)  # 1 / 0.001 may lie a rounding above 1000
    return [index / count for index in range(count + 1)]
