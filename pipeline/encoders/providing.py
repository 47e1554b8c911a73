"""The frozen towers of models/encoders: released weights resolved, or small ones trained on the pairs."""

import sys
from typing import Any, get_args

import torch
from torch import Tensor

from pipeline import encoders, params
from pipeline.artifacts.files import digest, remove_siblings
from pipeline.artifacts.weights import model_digest, save_model
from pipeline.datasets.pairs import PairShard
from pipeline.encoders import released, runs
from pipeline.encoders.config import Config
from pipeline.project import Project
from pipeline.source_code import code_digest
from pipeline.training import Run

NAMES = get_args(released.Kind)


def key_of(project: Project, name: released.Kind, config: Any) -> str:
    """Digest of what decides the weights."""
    if config.source != released.TRAIN:
        return released.fingerprint(config.source, project.root)
    decided = {stage: project.manifest(stage).digest for stage in ("download", "filter")}
    decided |= {"config": params.plain(config.train), "code": code_digest(runs.__name__)}
    if name == "clip" and config.train.architecture.tower == "lit":
        decided["dino"] = model_digest(project.encoder("dino"))
    return digest(decided)


def obtain(project: Project, name: released.Kind, config: Any, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and config, read, downloaded or trained.

    Raises:
        BadInput: the manifests are of different shards; or an input is not there, or cannot be used.
    """
    if config.source != released.TRAIN:
        return released.resolve(name, config.source, project.root)
    pairs = _pairs(project)
    run = Run.of(project, f"encoders-{name}", key)
    torch.set_num_threads(project.machine.threads)
    if name == "dino":
        found = runs.train_dino(config.train, pairs, run, project.machine)
    else:
        found = runs.train_clip(config.train, pairs, project.encoder("dino"), run, project.machine)
    remove_siblings(run.checkpoints)
    return found


def _pairs(project: Project) -> list[PairShard]:
    filtered = {row.shard: folder for row, folder in project.inputs("filter")}
    images = {row.shard: place for row, place in project.places("download")}
    project.require_shards({"download": images, "filter": filtered})
    return [PairShard(name=name, download=place, filtered=filtered[name], masks=None) for name, place in images.items()]


def provide(project: Project, name: released.Kind) -> None:
    """Make models/encoders/NAME what the parameters say."""
    config = getattr(project.config("encoders", Config), name)
    folder, key = project.encoder(name), key_of(project, name, config)
    if encoders.has_key(folder, key):
        print(f"{name}: there already ({config.source})", file=sys.stderr)
        return
    state, described = obtain(project, name, config, key)
    found = save_model(folder, state, {**described, "source": config.source, "key": key})
    print(f"{name}: {config.source}, weights {found[:12]}", file=sys.stderr)
