"""Training runs of the small towers, from pairs to weights; files and keys are handed in."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import params
from pipeline.artifacts.weights import load_model
from pipeline.datasets.batches import PairCollate, PairTransform, seen_tokens
from pipeline.datasets.joined import PairShard
from pipeline.datasets.pairs import PairLoader
from pipeline.encoders import patch_encoder, small_clip, small_vit
from pipeline.encoders.clip_training import ClipConfig, ClipTraining
from pipeline.encoders.crops import MultiCrop, collate_crops
from pipeline.encoders.dino_training import DinoConfig, SelfDistillation
from pipeline.machine import Machine
from pipeline.text import prompts
from pipeline.text.tokenizers import BytePairTokenizer
from pipeline.training import Run, fit


def train_dino(
    config: DinoConfig, pairs: Sequence[PairShard], run: Run, machine: Machine
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train, or continue; weights and config of the teacher's tower."""
    torch.manual_seed(config.optimisation.seed)
    model = SelfDistillation(config)
    loader = PairLoader(
        pairs,
        batch_size=config.optimisation.micro_batch,
        seed=config.optimisation.seed,
        shuffle=config.shuffle,
        threads=machine.threads,
        workers=machine.loaders,
        prepare=MultiCrop(config.crops),
        collate=collate_crops,
    )
    result = fit(
        model,
        model.loss,
        loader,
        config.optimisation,
        run=run,
        device=machine.device,
        after_step=model.follow,
    )
    encoder = small_vit.TrainedPatchEncoder(model.teacher.tower)
    return encoder.state_dict(), {
        "family": small_vit.FAMILY,
        "architecture": params.plain(config.tower),
        "train": params.plain(config),
        "trained": {"images": result.images, "failed": result.failed, "precision": result.precision},
    }


def train_clip(
    config: ClipConfig, pairs: Sequence[PairShard], dino: Path, run: Run, machine: Machine
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Train, or continue; weights and config of both towers. `dino`: folder of the tower that LiT keeps frozen."""
    torch.manual_seed(config.optimisation.seed)
    frozen, frozen_config = None, None
    if config.architecture.tower == "lit":
        state, frozen_config = load_model(dino)
        frozen = patch_encoder(state, frozen_config, dino)
    templates = prompts.templates(config.templates)
    tokenise = BytePairTokenizer(config.architecture.text.context_length)
    vocabulary = seen_tokens(pairs, tokenise, templates=templates)
    model = ClipTraining(small_clip.SmallClip(config.architecture, vocabulary, frozen), config)
    loader = PairLoader(
        pairs,
        batch_size=config.optimisation.micro_batch,
        seed=config.optimisation.seed,
        shuffle=config.shuffle,
        threads=machine.threads,
        workers=machine.loaders,
        prepare=PairTransform(views=config.views, num_prompts=config.num_prompts, templates=templates),
        collate=PairCollate(tokenise, rows=config.architecture.text.takes_rows),
    )
    result = fit(model, model.loss, loader, config.optimisation, run=run, device=machine.device)
    return model.finished().state_dict(), {
        "family": small_clip.FAMILY,
        "architecture": params.plain(config.architecture),
        "frozen": frozen_config,
        "train": params.plain(config),
        "trained": {"images": result.images, "failed": result.failed, "precision": result.precision},
    }
