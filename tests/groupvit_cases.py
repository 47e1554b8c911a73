"""A small GroupViT and a batch of coloured boxes for it."""

import torch
import yaml

from pipeline import params
from pipeline.interfaces import TrainBatch
from pipeline.methods import groupvit

CONFIG = yaml.safe_load("""
patches: {image_size: 32, first_stride: 8, widths: [], norm: true, position: noise}
grouping: {dim: 16, heads: 2, depths: [1, 1, 1], group_tokens: [6, 3, 0], output_groups: [5, 3], assignment: hard,
           gumbel: true, drop_path: 0.0}
text: {context_length: 12, width: 16, layers: 1, heads: 2, pooling: eos, vocabulary: full}
projector_hidden: 24
embed_dim: 12
loss: {caption: 1.0, multi_label: 1.0, num_prompts: 2, templates: single, form: released, halved: true,
       share_scale: false, temperature: 0.07, max_scale: 100.0}
augmentation: {image_size: 32, crop_scale: [0.5, 1.0], crop_ratio: [0.8, 1.25], flip_chance: 0.5,
               rand_augment: 0, erase_chance: 0.0}
shuffle: {block_rows: 4, window_blocks: 2, weights: null}
optimisation: {images: 160, batch_size: 8, lr: 0.003, lr_multipliers: {}, final_lr_fraction: 0.1,
               warmup_images: 16, cosine_from: warmup, weight_decay: 0.05, decayed: weights, betas: [0.9, 0.98],
               clip_norm: 5.0, micro_batches: 1, ema: 0.0, precision: fp32, checkpoint_images: 1000,
               log_images: 8, seed: 0}
""")
WORDS = ("red", "green", "blue", "grey", "white", "black", "pink", "brown")


def config(**changes) -> groupvit.Config:
    """The tests' config; `loss={...}` and the like replace keys of a block."""
    values = {
        name: {**block, **changes.get(name, {})} if isinstance(block, dict) else changes.get(name, block)
        for name, block in CONFIG.items()
    }
    return params.build(groupvit.Config, values, "train.groupvit")


def model(**changes) -> groupvit.GroupViT:
    torch.manual_seed(0)
    return groupvit.build(config(**changes), None)


def batch(tower: groupvit.GroupViT, size: int = 8, prompts: int = 2) -> TrainBatch:
    """Pictures of a coloured rectangle each on a dull ground, the colour in caption and prompts."""
    generator = torch.Generator().manual_seed(1)
    colours = torch.randn(8, 3, generator=generator)
    pixels = torch.randn(size, 3, 32, 32, generator=generator) * 0.3
    for i in range(size):
        top, left = (8 * torch.randint(0, 3, (2,), generator=generator)).tolist()
        pixels[i, :, top : top + 16, left : left + 16] += 2 * colours[i % 8, :, None, None]
    captions = [f"a {WORDS[i % 8]} box" for i in range(size)]
    rows = [tower.tokenizer([f"a photo of a {WORDS[(i + k) % 8]}." for i in range(size)]) for k in range(prompts)]
    return TrainBatch(
        pixels=pixels,
        captions=captions,
        token_ids=tower.tokenizer(captions),
        regions=None,
        uids=[f"uid{i}" for i in range(size)],
        prompt_ids=torch.stack(rows) if prompts else None,
    )
