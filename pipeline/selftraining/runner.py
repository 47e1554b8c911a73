"""A student from its name to its folder: labels, network and key, whichever kind of labels it learns."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from torch import nn
from tqdm import tqdm

from pipeline.artifacts.files import digest, remove_siblings
from pipeline.artifacts.weights import model_digest, save_model
from pipeline.datasets.benchmarks import Benchmark, open_benchmark
from pipeline.encoders import has_key
from pipeline.engine import interruptible
from pipeline.evaluation import candidates
from pipeline.evaluation.config import Config as Evaluation
from pipeline.evaluation.pairs import benchmark_root, tuned
from pipeline.params import plain
from pipeline.project import Project
from pipeline.selftraining import crops, labels, students
from pipeline.selftraining.config import Config, TransferConfig
from pipeline.source_code import code_digest
from pipeline.training import Run, fit


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One student of one benchmark.

    Attributes:
        spec: `selftrained:<teacher>` or `transfer:<encoder>`.
        split: list that names the training images, `ids`.
        labelling: how a teacher labels them; None for the true masks.
    """

    spec: str
    benchmark: Benchmark
    split: str
    ids: list[str]
    labelling: labels.Labelling | None
    config: Config
    evaluation: Evaluation

    @property
    def settings(self) -> Config | TransferConfig:
        """The block with this job's crops and optimisation."""
        return self.config if self.labelling else self.config.transfer

    def decided(self, project: Project) -> dict[str, Any]:
        """All that decides the weights beside the code of network and crops, as config.json holds it.

        Raises:
            BadInput: the teacher or the tower is absent.
        """
        settings = {"crops": plain(self.settings.crops), "optimisation": plain(self.settings.optimisation)}
        described: dict[str, Any] = {"benchmark": self.benchmark.name, "classes": list(self.benchmark.classes)}
        described |= {"geometry": plain(self.evaluation.geometry), "config": settings}
        if self.labelling:
            found = self.labelling.decided(project)
            settings |= {"network": plain(self.config.network), "labels": plain(self.config.labels)}
            inputs = {"teacher": found["digests"], "images": found["images"], "labels": digest(found)}
            return {"student": "selftrained", **described, "inputs": inputs}
        encoder = self.spec.removeprefix(candidates.TRANSFER)
        inputs = {"encoder": model_digest(project.encoder(encoder)), "images": self.benchmark.digest(self.ids)}
        return {"student": "transfer", "encoder": encoder, **described, "inputs": inputs}


def jobs(config: Config, evaluation: Evaluation, project: Project) -> Iterator[Job]:
    """Every student that the parameters name: teachers and towers, each on every benchmark of the evaluation.

    Raises:
        BadInput: a benchmark has no list of training images, or a file that it names is absent.
        ParamsError: a teacher that cannot teach.
    """
    for entry in evaluation.benchmarks:
        root = benchmark_root(project, entry.name, entry.root)
        benchmark = open_benchmark(entry.name, root, evaluation.protocol)
        split: str = config.splits.get(entry.name) or benchmark.layout["tune"]
        job = partial(Job, benchmark=benchmark, split=split, config=config, evaluation=evaluation)
        for teacher in config.teachers:
            ids = benchmark.listed(split, masks=False)
            choose = config.labels.tuned and tuned(teacher, benchmark, evaluation, project)
            tune_ids = benchmark.ids("tune", entry.tune_limit) if choose else []
            labelling = labels.plan(teacher, benchmark, ids, tune_ids, evaluation, project)
            yield job(spec=f"{candidates.SELFTRAINED}{teacher}", ids=ids, labelling=labelling)
        for encoder in config.transfer.encoders:
            ids = benchmark.listed(split, masks=True)
            yield job(spec=f"{candidates.TRANSFER}{encoder}", ids=ids, labelling=None)


def obtain(job: Job, project: Project) -> str:
    """Make the student's folder what the parameters say; returns a line for people.

    Raises:
        BadInput, ParamsError: see `labels.write_labels`. Interrupted: labels and checkpoint so far are kept.
    """
    folder, decided = candidates.student_folder(job.spec, job.benchmark.name, project), job.decided(project)
    key = digest({**decided, "code": code_digest(students.__name__, crops.__name__)})
    name = f"selftrain-{folder.parent.name}-{job.benchmark.name}"
    if has_key(folder, key):
        return f"{name}: there already"
    read, learned_from = _labelled(job, decided, name, project)
    optimisation = job.settings.optimisation
    torch.manual_seed(optimisation.seed)
    network = _network(job, project)
    run = Run.of(project, name, key, kind="selftrain")
    loader = crops.CropLoader(
        job.ids,
        read,
        crops=job.settings.crops,
        geometry=job.evaluation.geometry,
        batch_size=optimisation.micro_batch,
        seed=optimisation.seed,
        threads=project.machine.threads,
    )
    result = fit(network, partial(students.loss, network), loader, optimisation, run=run, device=project.machine.device)
    remove_siblings(run.checkpoints)
    trained = {"images": result.images, "precision": result.precision}
    save_model(folder, network.state_dict(), {**decided, "learned_from": learned_from, "trained": trained, "key": key})
    return f"{name}: {result.images:,} images at {result.images_per_second:.0f}/s"


def _labelled(job: Job, decided: dict[str, Any], name: str, project: Project) -> tuple[crops.Read, dict[str, Any]]:
    """How to read a training image with its labels, and what they are."""
    known = {"split": job.split, "num_images": len(job.ids)}
    if job.labelling is None:
        return partial(_true, job.benchmark), {"labels": "true masks", **known}
    folder = project.checkpoints(f"{name}-labels", decided["inputs"]["labels"])
    with interruptible(), tqdm(total=None, desc=f"{name}: labels", unit="image", mininterval=1.0) as progress:
        found = labels.write_labels(job.labelling, folder, project, progress.update)
    remove_siblings(folder)
    pseudo = labels.PseudoLabels(folder, job.ids, len(job.benchmark.classes), job.config.labels.keep)
    learned_from = {"labels": f"predictions of {job.labelling.teacher}", **known, **found}
    return partial(_predicted, job.benchmark, pseudo), learned_from


def _predicted(
    benchmark: Benchmark, pseudo: labels.PseudoLabels, image_id: str
) -> tuple[UInt8[ndarray, "height width 3"], UInt8[ndarray, "height width"]]:
    return benchmark.image(image_id), pseudo(image_id)


def _true(
    benchmark: Benchmark, image_id: str
) -> tuple[UInt8[ndarray, "height width 3"], UInt8[ndarray, "height width"]]:
    sample = benchmark.sample(image_id)
    return sample.image, np.where(sample.label == benchmark.ignore_index, np.uint8(crops.IGNORED), sample.label)


def _network(job: Job, project: Project) -> nn.Module:
    """The student before its training."""
    num_classes = len(job.benchmark.classes)
    if job.labelling:
        return students.UPerNet(job.config.network, num_classes, job.config.crops.size)
    name: Any = job.spec.removeprefix(candidates.TRANSFER)
    return students.EncoderHead(name, students.open_encoder(name, project), num_classes)
