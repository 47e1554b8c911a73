"""A small ZeroSeg, batches whose views follow their pictures, and a small CLIP to lend it."""

import torch
import torch.nn.functional as F
import yaml

from pipeline import params
from pipeline.encoders import small_clip
from pipeline.encoders.small_vit import TowerConfig
from pipeline.interfaces import TrainBatch
from pipeline.methods import zeroseg
from pipeline.nn.text import TextSizes, Vocabulary

CONFIG = yaml.safe_load("""
encoder: {image_size: 32, first_stride: 8, widths: [], dim: 16, layers: 1, heads: 2, mask_ratio: 0.5}
decoder: {dim: 12, layers: 1, heads: 2}
head: {dim: 16, heads: 2, depths: [1, 1, 1], group_tokens: [6, 3, 0], output_groups: [6, 3], assignment: hard,
       gumbel: true, drop_path: 0.0}
head_input: visible
projector: {hidden: 24, norm: batch, shared: true}
embed_dim: 10
scales: [1, 2]
loss: {reconstruction: 1.0, multi_scale: 1.0, match: 1.0, all_views: true, over_dims: sum, over_views: mean,
       over_segments: mean, unit_image: true, unit_segments: true, normalised_patches: false}
logit_scale: null
shuffle: {block_rows: 4, window_blocks: 2, weights: null}
optimisation: {images: 160, batch_size: 8, lr: 0.003, lr_multipliers: {}, final_lr_fraction: 0.1,
               warmup_images: 16, cosine_from: warmup, weight_decay: 0.05, decayed: weights, betas: [0.9, 0.95],
               clip_norm: 1.0, micro_batches: 1, ema: 0.0, precision: fp32, checkpoint_images: 1000, log_images: 8,
               seed: 0}
""")


def config(**changes) -> zeroseg.Config:
    """The tests' config; `loss={...}` and the like replace keys of a block."""
    values = {
        name: {**block, **changes.get(name, {})} if isinstance(block, dict) else changes.get(name, block)
        for name, block in CONFIG.items()
    }
    return params.build(zeroseg.Config, values, "train.zeroseg")


def model(**changes) -> zeroseg.ZeroSeg:
    torch.manual_seed(0)
    return zeroseg.build(config(**changes), None)


def batch(size: int = 8, num_views: int = 5, dim: int = 10) -> TrainBatch:
    """Pictures whose quarters have colours, with views that depend on those."""
    generator = torch.Generator().manual_seed(1)
    colours = torch.randn(size, 4, 3, generator=generator)
    grid = colours.unflatten(1, (2, 2)).permute(0, 3, 1, 2)
    pixels = F.interpolate(grid, (32, 32)) + 0.1 * torch.randn(size, 3, 32, 32, generator=generator)
    project = torch.randn(3, dim, generator=generator)
    tiles = colours @ project
    views = torch.cat([tiles.mean(dim=1, keepdim=True), tiles.repeat(1, 8, 1)], dim=1)[:, :num_views]
    return batch_of(pixels, F.normalize(views, dim=-1))


def batch_of(pixels: torch.Tensor, views: torch.Tensor) -> TrainBatch:
    size = len(pixels)
    ids = torch.zeros(size, 0, dtype=torch.int64)
    return TrainBatch(pixels, [""] * size, ids, None, [f"uid{i}" for i in range(size)], views=views)


def clip(embed_dim: int = 10) -> small_clip.SmallClip:
    torch.manual_seed(2)
    settings = small_clip.ClipArchitecture(
        tower="scratch",
        image=TowerConfig(image_size=16, first_stride=8, widths=(), dim=8, layers=0, heads=1, class_token=False),
        text=TextSizes(context_length=8, width=8, layers=0, heads=1, pooling="mean"),
        embed_dim=embed_dim,
        projection="linear",
        pooling="smooth_maximum",
        sharpness=5.0,
    )
    tower = small_clip.SmallClip(settings, Vocabulary.of(torch.tensor([5, 9, 320]), vocab_size=49408), None)
    tower.scale.fill_(30.0)
    saved = {"family": small_clip.FAMILY, "architecture": params.plain(settings), "frozen": None}
    tower.saved = saved
    return tower.eval()
