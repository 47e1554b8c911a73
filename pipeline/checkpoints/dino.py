"""DINO's releases: the bare backbone, or a training's file with teacher and student, as timm's ViT.

Source: card ovsegmentor.md section 7 (keys); DINO's release (the teacher is what it evaluates).
"""

from collections.abc import Mapping
from typing import Any

from torch import nn

from pipeline.artifacts.files import BadInput
from pipeline.checkpoints.source import Source
from pipeline.checkpoints.tables import Converted, Rule, converted_file
from pipeline.encoders import timm_dino
from pipeline.encoders.files import WRAPPERS
from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD

ENTRY = "teacher"
SETTING = "state or settings of the training"
BESIDE = {
    "student": "the student: DINO evaluates its teacher",
    "dino_loss|ibot_patch_loss|fp16_scaler": SETTING,
    "optimizer|lr_scheduler|scheduler|scaler|epoch|iteration|args|config|arch|best_acc": SETTING,
}
_WRAPPING = r"(?:module\.)?(?:backbone\.)?"
RULES = (Rule(_WRAPPING + r"(cls_token|pos_embed|(?:patch_embed|blocks|norm)\..+)", r"\1"),)
IGNORED = {
    r"(module\.)?head\..+": "head of the training, or a classifier",
}


def convert(entries: Mapping[str, Any]) -> Converted:
    """The backbone under timm's names."""
    return converted_file(entries, RULES, IGNORED, wrappers=WRAPPERS, beside=BESIDE)


def describe(converted: Converted, source: Source) -> tuple[dict[str, Any], nn.Module]:
    """Config of the model folder, and a model to compare names and shapes with.

    The numbers are read off the shapes where nobody names timm's architecture.

    Raises:
        BadInput: no ViT, or an unknown name.
    """
    name = source.architecture or source.card.get("architecture")
    described = {"name": name} if name else timm_dino.architecture_of(converted.state, source.file)
    hub = source.card.get("pretrained_cfg", {})
    config = {
        "family": timm_dino.FAMILY,
        "architecture": described,
        "mean": list(hub.get("mean", IMAGENET_MEAN)),
        "std": list(hub.get("std", IMAGENET_STD)),
    }
    try:
        return config, timm_dino.build_model(described)
    except ValueError as error:
        raise BadInput(source.file, str(error), "Name one of timm's ViTs with --architecture") from error
