"""A small S-Seg, pictures of one coloured rectangle each, and a checkout that trains it."""

import shutil
from pathlib import Path

import torch
import yaml
from pair_shards import write_pairs

from pipeline import params
from pipeline.artifacts.files import digest
from pipeline.artifacts.manifest import Manifest
from pipeline.artifacts.weights import save_model
from pipeline.encoders.small_vit import TowerConfig
from pipeline.interfaces import TrainBatch
from pipeline.methods import sseg
from pipeline.store import Store

CONFIG = yaml.safe_load("""
backbone: {kind: conv, name: "", first_stride: 4, widths: [8, 16], blocks: [1, 1], init: random}
decoder: {pixel_dim: 16, mask_dim: 8, dim: 16, queries: 6, layers: 2, heads: 2, hidden: 32, dropout: 0.0}
text: {context_length: 12, width: 16, layers: 1, heads: 2, pooling: eos, vocabulary: full}
loss: {mask: 1.0, contrastive: 1.0, focal: 20.0, dice: 1.0, deep_supervision: true, pooling: pool_then_project,
       temperature: 0.07, max_scale: 100.0}
embed_dim: 12
combine: normalised
augmentation: {image_size: 32, crop_scale: [0.5, 1.0], crop_ratio: [0.8, 1.25], flip_chance: 0.5, caption_form: caption}
shuffle: {block_rows: 4, window_blocks: 2, weights: null}
optimisation: {images: 160, batch_size: 8, lr: 0.003, lr_multipliers: {text: 2.0}, final_lr_fraction: 0.1,
               warmup_images: 16, cosine_from: warmup, weight_decay: 0.05, decayed: weights, betas: [0.9, 0.98],
               clip_norm: 1.0, micro_batches: 1, ema: 0.0, precision: fp32, checkpoint_images: 1000, log_images: 8,
               seed: 0}
""")
WORDS = ("red", "green", "blue", "grey", "white", "black", "pink", "brown")
STAGES = {"download": "download", "filter": "filtered", "pseudo_masks": "masks"}


def config(**changes) -> sseg.Config:
    """The tests' config; `loss={...}` and the like replace keys of a block."""
    values = {
        name: {**block, **changes.get(name, {})} if isinstance(block, dict) else changes.get(name, block)
        for name, block in CONFIG.items()
    }
    return params.build(sseg.Config, values, "train.sseg")


def model(**changes) -> sseg.SSeg:
    torch.manual_seed(0)
    return sseg.build(config(**changes), None)


def batch(tower: sseg.SSeg, size: int = 8) -> TrainBatch:
    """Pictures of one coloured rectangle each on a dull ground, its region as label 1, its colour in the caption."""
    generator = torch.Generator().manual_seed(1)
    colours = torch.randn(len(WORDS), 3, generator=generator)
    pixels = torch.randn(size, 3, 32, 32, generator=generator) * 0.1
    regions = torch.zeros(size, 8, 8, dtype=torch.uint8)
    for i in range(size):
        top, left = torch.randint(0, 4, (2,), generator=generator).tolist()
        regions[i, top : top + 4, left : left + 3] = 1
        pixels[i, :, 4 * top : 4 * top + 16, 4 * left : 4 * left + 12] += colours[i % len(WORDS), :, None, None]
    captions = [f"a {WORDS[i % len(WORDS)]} box" for i in range(size)]
    return TrainBatch(pixels, captions, tower.tokenizer(captions), regions, [f"uid{i}" for i in range(size)])


def make_project(root: Path, **optimisation) -> Path:
    """A checkout with three shards in its store, a DINO tower and the tests' small S-Seg."""
    store = Store(root / "data/store")
    manifests: dict[str, list] = {stage: [] for stage in STAGES}
    for number in range(3):
        shard = write_pairs(root / "made", f"{number:05d}", 14, rejected=(number,))
        for stage, attribute in STAGES.items():
            key = digest([stage, shard.name])
            folder = store.temporary(stage, key)
            shutil.copytree(getattr(shard, attribute), folder, dirs_exist_ok=True)
            counts = {"rows_in": 14, "rows": 14, "failed": 0, "detail": {}}
            store.publish(folder, stage, key, {"stage": stage, "shard": shard.name, "fields": {}, "counts": counts})
            manifests[stage].append(store.row(stage, shard.name, key))
    for stage, rows in manifests.items():
        path = root / "data/manifests" / f"{stage}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        Manifest(stage, rows).write(path)
    torch.manual_seed(0)
    dino = TowerConfig(
        image_size=32, first_stride=4, widths=(8, 16), dim=24, layers=1, heads=2, class_token=False
    ).build()
    save_model(root / "models/encoders/dino", dino.state_dict(), {})
    steps = {"images": 240, "checkpoint_images": 40, "log_images": 16} | optimisation
    block = CONFIG | {"optimisation": CONFIG["optimisation"] | steps}
    block["text"] = CONFIG["text"] | {"vocabulary": "seen"}
    block["backbone"] = CONFIG["backbone"] | {"init": "selfsup"}
    (root / "params.yaml").write_text(yaml.safe_dump({"train": {"sseg": block}}))
    return root
