"""A method's training: payloads of the pairs and of its cached targets in, models/NAME out."""

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch

from pipeline import methods, params
from pipeline.artifacts.files import digest, remove_siblings
from pipeline.artifacts.weights import model_digest, save_model
from pipeline.datasets.pairs import PairLoader, PairShard
from pipeline.machine import Machine
from pipeline.project import Project
from pipeline.source_code import code_digest
from pipeline.training import FitResult, Run, distributed, fit
from pipeline.training.compiling import compile_blocks, compile_whole, recompute_blocks
from pipeline.training.phases import Phase, TrainingData
from pipeline.training.steps import Loss

INPUTS = ("download", "filter")
SINGLE = ("index", "codebook")  # targets that are one payload, not one per shard


def read_data(project: Project, targets: tuple[str, ...]) -> TrainingData:
    """The payload folders, each checked for existence and size; images may stay in the remote (`Project.places`).

    Raises:
        BadInput: the manifests are of different shards.
        MissingPayload: a payload is neither here nor in the remote.
    """
    images = {row.shard: place for row, place in project.places("download")}
    stages = ("filter", *(target for target in targets if target not in SINGLE))
    found = {stage: {row.shard: folder for row, folder in project.inputs(stage)} for stage in stages}
    project.require_shards({"download": images, **found})
    shards = [
        PairShard(
            name=name,
            download=images[name],
            filtered=folder,
            masks=found.get("pseudo_masks", {}).get(name),
            views=found.get("teacher", {}).get(name),
            groups=found.get("groups", {}).get(name),
        )
        for name, folder in found["filter"].items()
    ]
    single = {target: project.inputs(target)[0][1] if target in targets else None for target in SINGLE}
    return TrainingData(shards=shards, **single)


def train(project: Project, name: str) -> None:
    """Train `name` with the parameters that are there, or continue; write models/NAME."""
    method = methods.get(name)
    config = project.config(f"train.{name}", method.Config)
    inputs = {stage: project.manifest(stage).digest for stage in (*INPUTS, *method.TARGETS)}
    inputs |= {tower: model_digest(project.encoder(tower)) for tower in method.ENCODERS}
    decided = {"method": name, "config": params.plain(config), "inputs": inputs}
    key = digest({**decided, "code": code_digest(method.__name__)})
    data = read_data(project, method.TARGETS)
    model = start(project, method, config, data)
    run = Run.of(project, name, key, best=decided)
    with distributed.process_group(project.machine.device) as device:
        results = fit_phases(project, method, model, config, data, run, device)
        if not distributed.leads():
            return
    trained = {
        "images": sum(result.images for result in results),
        "failed": sum(result.failed for result in results),
        "precision": results[-1].precision if results else "fp32",
    }
    save_model(project.model(name), model.state_dict(), {**decided, "trained": trained})


def start(project: Project, method: ModuleType, config: Any, data: TrainingData) -> Any:
    """The model that training starts from; its blocks are computed twice where this machine says so."""
    encoders = project.encoder("dino").parent
    torch.set_num_threads(project.machine.threads)
    model = methods.fresh(method, config, method.vocabulary(config, data), encoders)
    methods.attach(method, model, encoders)
    if project.machine.recompute:
        recompute_blocks(model)
    return model


def phase_loss(project: Project, model: Any, phase: Phase) -> Loss:
    """The phase's loss, compiled where this machine says so: as a whole where it can be, else the model's blocks.

    Losses over the parts of a batch wait for one another; and DDP sends gradients while others are computed, which one
    graph would give all at its end.
    """
    settings = phase.optimisation
    if not project.machine.compile:
        return phase.loss
    if phase.traceable and settings.micro_batches == 1 and distributed.ranks() == 1:
        return compile_whole(phase.loss, settings.micro_batch)
    compile_blocks(model)
    return phase.loss


def _phase_run(project: Project, run: Run, phase: str, before: str) -> Run:
    """The files of one of several phases."""
    name = f"{run.name}-{phase}"
    places = {"log": project.logs / f"{name}.jsonl", "before": before}
    places |= {kind: folder.with_name(name) for kind in ("live", "board", "pictures") if (folder := getattr(run, kind))}
    return replace(run, name=name, checkpoints=project.checkpoints(name, run.key), **places)


def fit_phases(
    project: Project, method: ModuleType, model: Any, config: Any, data: TrainingData, run: Run, device: str
) -> list[FitResult]:
    """Every phase of the method in turn; their curves make one."""
    before, results = "", []  # a method that learns nothing has no phase
    for phase in method.phases(model, config, data):
        own = _phase_run(project, run, phase.name, before) if phase.name else run
        phase.begin()
        loader = pair_loader(data, config, phase, project.machine)
        loss = phase_loss(project, model, phase)
        result = fit(model, loss, loader, phase.optimisation, run=own, device=device, after_step=phase.after_step)
        distributed.wait_for_all()
        if distributed.leads():
            remove_siblings(own.checkpoints)
            print(f"{own.name}: {result.images:,} images at {result.images_per_second:.0f}/s", file=sys.stderr)
        before = own.curve.read_text(encoding="utf-8")
        results.append(result)
    return results


def pair_loader(data: TrainingData, config: Any, phase: Phase, machine: Machine) -> PairLoader:
    """This process's share of the phase's batches; the processes of a host share its loader's workers, too.

    Raises:
        ParamsError: the processes cannot share a batch, or each of its parts, equally.
    """
    batch, ranks = phase.optimisation.micro_batch, distributed.ranks()
    if batch % ranks:
        where = "optimisation: batch_size / micro_batches"
        raise params.ParamsError(f"{where}: {ranks} processes cannot share {batch} images equally")
    return PairLoader(
        data.shards,
        batch_size=batch,
        seed=phase.optimisation.seed,
        shuffle=config.shuffle,
        threads=machine.threads,
        workers=-(-machine.loaders // distributed.local_ranks()),
        prepare=phase.prepare,
        collate=phase.collate,
        share=(distributed.rank(), ranks),
    )
