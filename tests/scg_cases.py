"""SCG between two small towers with random weights, and a batch of four pictures with clusters and nouns."""

from pathlib import Path

import torch
import torch.nn.functional as F

from pipeline import methods, params
from pipeline.artifacts.weights import save_model
from pipeline.datasets.region_batches import RegionBatch
from pipeline.encoders import small_clip
from pipeline.encoders.small_vit import TowerConfig, TrainedPatchEncoder
from pipeline.methods import scg
from pipeline.nn.text import Vocabulary
from pipeline.source_code import REPO
from pipeline.text.tokenizers import BytePairTokenizer

CLUSTERS, SIDE = 5, 16
NOUNS = ["dog", "car", "house", "bird", "tree"]


def towers() -> tuple[small_clip.SmallClip, TrainedPatchEncoder, dict, dict]:
    torch.manual_seed(0)
    image = {
        "image_size": SIDE,
        "first_stride": 4,
        "widths": [],
        "dim": 12,
        "layers": 2,
        "heads": 2,
        "class_token": True,
    }
    architecture = {
        "tower": "scratch",
        "image": image,
        "text": {"context_length": 8, "width": 8, "layers": 0, "heads": 1, "pooling": "mean"},
        "embed_dim": 10,
        "projection": "linear",
        "pooling": "both",
        "sharpness": 5.0,
    }
    settings = params.build(small_clip.ClipArchitecture, architecture, "clip")
    ids = BytePairTokenizer(8)([f"a photo of a {noun}." for noun in NOUNS]).flatten()
    clip = small_clip.SmallClip(settings, Vocabulary.of(ids, vocab_size=49408), None)
    clip.scale.fill_(20.0)
    grouping = image | {"first_stride": 2, "dim": 8, "layers": 1, "class_token": False}
    dino = TrainedPatchEncoder(params.build(TowerConfig, grouping, "dino").build())
    described = {"family": small_clip.FAMILY, "architecture": architecture, "frozen": None}
    return clip, dino, described, {"family": "trained_dino", "architecture": grouping}


def made_encoders(folder: Path) -> Path:
    clip, dino, clip_config, dino_config = towers()
    save_model(folder / "clip", clip.state_dict(), clip_config)
    save_model(folder / "dino", dino.state_dict(), dino_config)
    return folder


def config(**changes) -> scg.Config:
    values = params.read(REPO / "profiles" / "base.yaml")["train"]["scg"]
    values["grouping"] |= {"clusters": CLUSTERS, "feature_dim": 8, "image_clusters": 3}
    values["regions"] |= {"width": 12, "offset_layers": 1}
    values["views"] |= {"image_size": SIDE}
    values["optimisation"] |= {
        "images": 16,
        "batch_size": 8,
        "checkpoint_images": 8,
        "log_images": 8,
        "precision": "fp32",
    }
    for name, change in changes.items():
        values[name] |= change
    return params.build(scg.Config, values, "train.scg")


def model(encoders, **changes) -> scg.SCG:
    settings = config(**changes)
    found = methods.fresh(scg, settings, None, encoders)
    scg.attach(found, encoders)
    found.centroids.copy_(F.normalize(torch.randn(CLUSTERS, 8, generator=torch.Generator().manual_seed(7)), dim=1))
    return found


def batch() -> RegionBatch:
    """Four pictures; the third has no noun."""
    generator = torch.Generator().manual_seed(3)
    return RegionBatch(
        pixels=torch.randn(4, 3, SIDE, SIDE, generator=generator),
        groups=torch.randint(0, CLUSTERS - 1, (4, 8, 8), generator=generator),
        nouns=["dog", "car", "house", "bird", "tree"],
        owner=torch.tensor([0, 0, 1, 3, 3]),
        uids=list("abcd"),
    )
