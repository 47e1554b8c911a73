"""Configurations of the methods at their papers' sizes, from the profiles."""

import tempfile
from pathlib import Path
from typing import Any

from pipeline import methods, params
from pipeline.cli import profile
from pipeline.source_code import REPO

# Method: the profile that has its paper's sizes, and settings for what cannot be had offline.
PAPER = {
    "groupvit": ("cc12m", []),
    "ovsegmentor": ("cc4m", ["train.ovsegmentor.text.tokenizer=bpe"]),
    "zeroseg": ("cc12m", []),
    "sseg": ("cc12m", ["train.sseg.backbone.init=random"]),
    "pseudo_mask_vit": ("cc12m", []),
    "scg": ("scg", ["train.scg.nouns.templates=single"]),  # a noun is encoded once in a run: nothing to measure
}


def paper_config(name: str, *more: str) -> Any:
    """The method's block of params.yaml at its paper's size, with `more` settings."""
    overlay, settings = PAPER[name]
    block = paper_params(overlay, *settings, *more)["train"][name]
    return params.build(methods.get(name).Config, block, f"train.{name}")


def paper_params(overlay: str, *settings: str) -> dict[str, Any]:
    """params.yaml as that profile and those settings make it."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "params.yaml"
        profile.write(REPO / "profiles", overlay, list(settings), target)
        return params.read(target)
