"""A teacher's labels for the training images of a benchmark, on disk, an image at a time.

`<id>.png` holds an image's class ids and, as its second channel, how sure the teacher is: the distance of the best
score from the background threshold (the score itself where the rule has none), in 255ths. The folder is named by what
decides its bytes; an interrupted labelling goes on with the images that are not there yet, and labels.json comes last.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray
from PIL import Image
from torch import Tensor

from pipeline.artifacts.files import atomic_json, atomic_write, read_json
from pipeline.artifacts.weights import load_config
from pipeline.datasets.benchmarks import Benchmark
from pipeline.evaluation import candidates
from pipeline.evaluation.config import Config as Evaluation
from pipeline.evaluation.pairs import settings_for
from pipeline.evaluation.scoring import Settings, choose_thresholds, open_segmenter
from pipeline.inference import BACKGROUNDS, ScoreModel, threshold_labels
from pipeline.params import ParamsError, plain
from pipeline.project import Project
from pipeline.selftraining.crops import IGNORED
from pipeline.source_code import code_digest

DONE = "labels.json"
LEVELS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Labelling:
    """A teacher at a benchmark: whom it asks, about which images, under which rules of the evaluation."""

    teacher: str
    benchmark: Benchmark
    ids: list[str]
    settings: Settings

    def decided(self, project: Project) -> dict[str, Any]:
        """What the labels depend on, as JSON. Masks are among it only where they choose the threshold.

        Raises:
            BadInput: the teacher's weights are absent.
        """
        settings = {name: value for name, value in plain(self.settings).items() if name != "device"}
        return {
            "teacher": self.teacher,
            "digests": candidates.digests(self.teacher, project),
            "settings": settings,
            "names": [*self.benchmark.classes, "", *self.benchmark.stuff],
            "images": self.benchmark.digest(self.ids, masks=False),
            "tuned_on": self.benchmark.digest(self.settings.tune_ids),
            "code": code_digest(__name__, _module(self.teacher, project)),
        }


def _module(teacher: str, project: Project) -> str:
    """The module that answers for a teacher."""
    if teacher.startswith(candidates.BASELINE):
        return f"pipeline.baselines.{teacher.removeprefix(candidates.BASELINE)}"
    folder = candidates.model_folder(teacher.removeprefix(candidates.UNTRAINED), project)
    return f"pipeline.methods.{load_config(folder).get('method')}"


def plan(
    teacher: str,
    benchmark: Benchmark,
    ids: list[str],
    tune_ids: list[str],
    evaluation: Evaluation,
    project: Project,
) -> Labelling:
    """The rules that the teacher's own evaluation follows; without `tune_ids` its threshold is the parameter.

    Raises:
        ParamsError: the teacher is a student of one benchmark itself.
    """
    if candidates.is_student(teacher):
        raise ParamsError(f"selftrain.teachers: {teacher} has learned labels itself; one round of self-training is run")
    settings = settings_for(teacher, benchmark, tune_ids, evaluation, project)
    return Labelling(teacher=teacher, benchmark=benchmark, ids=ids, settings=settings)


def write_labels(labelling: Labelling, folder: Path, project: Project, step: Callable[[], object]) -> dict[str, Any]:
    """Label every image that has no file yet; returns what labels.json holds: the rule and its threshold.

    `step` is called once per image labelled and per image that chooses the threshold.

    Raises:
        BadInput: the teacher or an image is absent or broken.
        ParamsError: the teacher does not score class names.
    """
    if (folder / DONE).is_file():
        return read_json(folder / DONE, "Delete the folder")
    settings, rule = labelling.settings, labelling.settings.backgrounds[0]
    model = candidates.load(labelling.teacher, project, settings.geometry).model
    if not isinstance(model, ScoreModel):
        raise ParamsError(f"selftrain.teachers: {labelling.teacher} does not score class names; choose one that does")
    segmenter, grid, _ = open_segmenter(model, labelling.benchmark, rule, settings)
    threshold: dict[str, Any] = {"value": None, "chosen_on": "no threshold"}
    if BACKGROUNDS[rule].thresholded:
        (threshold,) = choose_thresholds([(segmenter, grid)], labelling.benchmark, settings, step)
    for image_id in labelling.ids:
        file = folder / f"{image_id}.png"
        if not file.is_file():
            best, ids = segmenter(labelling.benchmark.image(image_id))
            named = threshold_labels(best, ids, threshold["value"])
            atomic_write(file, _png(named.cpu(), confidence(best.cpu(), threshold["value"])))
        step()
    found = {"background": rule, "threshold": threshold}
    atomic_json(folder / DONE, found)
    return found


def confidence(best: Float[Tensor, "height width"], threshold: float | None) -> UInt8[Tensor, "height width"]:
    """How far the best score lies from the threshold, on the side of background or on that of the class; in 255ths."""
    distance = best if threshold is None else (best - threshold).abs()
    return (distance.clamp(0, 1) * (LEVELS - 1)).round().byte()


def _png(labels: Int64[Tensor, "height width"], sure: UInt8[Tensor, "height width"]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(torch.stack([labels.byte(), sure], dim=2).numpy(), "LA").save(buffer, "PNG")
    return buffer.getvalue()


class PseudoLabels:
    """The labels of a finished folder, less the pixels of each class about which the teacher is least sure.

    Of every class the most confident `keep` of all its pixels stay (more where confidences tie), so that a filter does
    not empty the classes that are rarer or harder. Source: CBST (Zou et al. 2018, section 3.2), with one share for all.
    """

    def __init__(self, folder: Path, ids: list[str], num_classes: int, keep: float) -> None:
        self._folder = folder
        self._floors = np.zeros(LEVELS, np.uint8)
        if keep < 1:
            counts = np.zeros((num_classes, LEVELS), np.int64)
            for image_id in ids:
                np.add.at(counts, self._read(image_id), 1)
            self._floors[:num_classes] = floors(counts, keep)

    def __call__(self, image_id: str) -> UInt8[ndarray, "height width"]:
        """Class ids, 255 where the teacher is not sure enough."""
        labels, sure = self._read(image_id)
        return np.where(sure >= self._floors[labels], labels, np.uint8(IGNORED))

    def _read(self, image_id: str) -> tuple[UInt8[ndarray, "height width"], UInt8[ndarray, "height width"]]:
        with Image.open(self._folder / f"{image_id}.png") as image:
            both = np.asarray(image)
        return both[..., 0], both[..., 1]


def floors(counts: Int64[ndarray, "classes levels"], keep: float) -> UInt8[ndarray, " classes"]:
    """The highest confidence of each class at or above which at least `keep` of its pixels lie; 0 for an absent one."""
    above = counts[:, ::-1].cumsum(1)[:, ::-1]
    enough = (above >= keep * above[:, :1]) & (above > 0)
    return np.where(enough.any(1), counts.shape[1] - 1 - enough[:, ::-1].argmax(1), 0).astype(np.uint8)
