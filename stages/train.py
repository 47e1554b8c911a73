"""Train a method on the pairs and its cached targets: `python -m stages.train METHOD`."""

import argparse
import shutil
import sys
from types import ModuleType
from typing import Any

import torch

from pipeline import methods, params
from pipeline.artifacts.files import digest
from pipeline.artifacts.weights import model_digest, save_model
from pipeline.datasets.pairs import PairLoader, PairShard
from pipeline.project import Project
from pipeline.source_code import code_digest
from pipeline.training import FitResult, Run, fit
from pipeline.training.compiling import compile_blocks
from pipeline.training.phases import Phase, TrainingData
from stages import open_project, report_errors

INPUTS = ("download", "filter")
SINGLE = ("index", "codebook")  # targets that are one payload, not one per shard


def read_data(project: Project, targets: tuple[str, ...]) -> TrainingData:
    """The payload folders, each checked for existence and size."""
    stages = (*INPUTS, *(target for target in targets if target not in SINGLE))
    found = {stage: {row.shard: folder for row, folder in project.inputs(stage)} for stage in stages}
    shards = [
        PairShard(
            name=name,
            download=found["download"][name],
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
    data, encoders = read_data(project, method.TARGETS), project.encoder("dino").parent
    torch.set_num_threads(project.machine.threads)
    model = methods.fresh(method, config, method.vocabulary(config, data), encoders)
    methods.attach(method, model, encoders)
    if project.machine.compile:
        compile_blocks(model)
    results = fit_phases(project, method, model, config, data, key)
    trained = {
        "images": sum(result.images for result in results),
        "failed": sum(result.failed for result in results),
        "precision": results[-1].precision if results else "fp32",
    }
    save_model(project.model(name), model.state_dict(), {**decided, "trained": trained})


def fit_phases(
    project: Project, method: ModuleType, model: Any, config: Any, data: TrainingData, key: str
) -> list[FitResult]:
    """Every phase of the method in turn; their curves make one."""
    name = method.__name__.rsplit(".", 1)[1]
    before, results = "", []  # a method that learns nothing has no phase
    for phase in method.phases(model, config, data):
        label = f"{name}-{phase.name}" if phase.name else name
        run = Run(
            name=label,
            key=key,
            checkpoints=project.checkpoints(label, key),
            curve=project.root / "reports" / "curves" / f"{name}.csv",
            log=project.logs / f"{label}.jsonl",
            live=project.logs / "dvclive" / label,
            before=before,
        )
        result = _fit_phase(project, model, config, data, phase, run)
        for other in run.checkpoints.parent.iterdir():
            if other.name != key:
                shutil.rmtree(other)
        print(f"{label}: {result.images:,} images at {result.images_per_second:.0f}/s", file=sys.stderr)
        before = run.curve.read_text(encoding="utf-8")
        results.append(result)
    return results


def _fit_phase(project: Project, model: Any, config: Any, data: TrainingData, phase: Phase, run: Run) -> FitResult:
    phase.begin()
    loader = PairLoader(
        data.shards,
        batch_size=phase.optimisation.batch_size,
        seed=phase.optimisation.seed,
        shuffle=config.shuffle,
        threads=project.machine.threads,
        workers=project.machine.loaders,
        prepare=phase.prepare,
        collate=phase.collate,
    )
    return fit(
        model,
        phase.loss,
        loader,
        phase.optimisation,
        run=run,
        device=project.machine.device,
        after_step=phase.after_step,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=methods.names())
    chosen = parser.parse_args().method
    report_errors(lambda: train(open_project(), chosen))
