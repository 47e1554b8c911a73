"""Train a method on the pairs and its cached targets: `python -m stages.train METHOD`."""

import argparse
import shutil
import sys

import torch

from pipeline import methods, params
from pipeline.artifacts.files import digest
from pipeline.artifacts.weights import model_digest, save_model
from pipeline.datasets.batches import PairCollate, PairTransform, seen_tokens
from pipeline.datasets.pairs import PairLoader, PairShard
from pipeline.project import Project
from pipeline.source_code import code_digest
from pipeline.text.tokenizers import tokenizer
from pipeline.training import Run, fit
from stages import open_project, report_errors

INPUTS = ("download", "filter")


def shards(project: Project, targets: tuple[str, ...]) -> list[PairShard]:
    """The pairs' payload folders, each checked for existence and size."""
    found = {stage: {row.shard: folder for row, folder in project.inputs(stage)} for stage in (*INPUTS, *targets)}
    masks = found.get("pseudo_masks")
    return [
        PairShard(
            name=name, download=found["download"][name], filtered=folder, masks=None if masks is None else masks[name]
        )
        for name, folder in found["filter"].items()
    ]


def train(project: Project, name: str) -> None:
    """Train `name` with the parameters that are there, or continue; write models/NAME."""
    method, machine = methods.get(name), project.machine
    config = project.config(f"train.{name}", method.Config)
    inputs = {stage: project.manifest(stage).digest for stage in (*INPUTS, *method.TARGETS)}
    inputs["dino"] = model_digest(project.encoder("dino"))
    decided = {"method": name, "config": params.plain(config), "inputs": inputs}
    key = digest({**decided, "code": code_digest(method.__name__)})
    pairs = shards(project, method.TARGETS)
    torch.set_num_threads(machine.threads)
    torch.manual_seed(config.optimisation.seed)
    tokenise = tokenizer("bpe", config.text.context_length)
    model = method.build(config, seen_tokens(pairs, tokenise) if config.text.vocabulary == "seen" else None)
    method.start(model, config, project.encoder("dino").parent)
    loader = PairLoader(
        pairs,
        batch_size=config.optimisation.batch_size,
        seed=config.optimisation.seed,
        shuffle=config.shuffle,
        threads=machine.threads,
        prepare=PairTransform(config.augmentation, method.target_grid(config)),
        collate=PairCollate(tokenise),
    )
    run = Run(
        name=name,
        key=key,
        checkpoints=project.checkpoints(name, key),
        curve=project.root / "reports" / "curves" / f"{name}.csv",
        log=project.logs / f"{name}.jsonl",
        live=project.logs / "dvclive" / name,
    )
    result = fit(model, lambda batch, _: model.loss(batch), loader, config.optimisation, run=run, device=machine.device)
    for other in run.checkpoints.parent.iterdir():
        if other.name != key:
            shutil.rmtree(other)
    trained = {"images": result.images, "failed": result.failed, "precision": result.precision}
    save_model(project.model(name), model.state_dict(), {**decided, "trained": trained})
    print(f"{name}: {result.images:,} images at {result.images_per_second:.0f}/s", file=sys.stderr)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("method", choices=methods.names())
    chosen = parser.parse_args().method
    report_errors(lambda: train(open_project(), chosen))
