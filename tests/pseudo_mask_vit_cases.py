"""A small pseudo-mask ViT, pictures of one rectangle each, and pooling by loops."""

import torch
import yaml
from sseg_cases import WORDS

from pipeline import params
from pipeline.interfaces import TrainBatch
from pipeline.methods import pseudo_mask_vit as pmv

CONFIG = yaml.safe_load("""
tower: {image_size: 32, first_stride: 8, widths: [], dim: 16, layers: 1, heads: 2, class_token: false}
text: {context_length: 12, width: 16, layers: 1, heads: 2, pooling: eos, vocabulary: full}
embed_dim: 12
temperature: 0.07
max_scale: 100.0
augmentation: {image_size: 32, crop_scale: [0.5, 1.0], crop_ratio: [0.8, 1.25], flip_chance: 0.5, caption_form: caption}
shuffle: {block_rows: 4, window_blocks: 2, weights: null}
optimisation: {images: 160, batch_size: 8, lr: 0.003, lr_multipliers: {}, final_lr_fraction: 0.1,
               warmup_images: 16, cosine_from: warmup, weight_decay: 0.05, decayed: weights, betas: [0.9, 0.98],
               clip_norm: 1.0, micro_batches: 1, ema: 0.0, precision: fp32, checkpoint_images: 1000, log_images: 8,
               seed: 0}
""")


def config(**changes) -> pmv.Config:
    """The tests' config; `tower={...}` and the like replace keys of a block."""
    values = {
        name: {**block, **changes.get(name, {})} if isinstance(block, dict) else changes.get(name, block)
        for name, block in CONFIG.items()
    }
    return params.build(pmv.Config, values, "train.pseudo_mask_vit")


def model(**changes) -> pmv.PseudoMaskViT:
    torch.manual_seed(0)
    return pmv.build(config(**changes), None)


def batch(size: int = 8) -> TrainBatch:
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
    return TrainBatch(pixels, captions, model().tokenizer(captions), regions, [f"uid{i}" for i in range(size)])


def pooled_by_loops(tokens: torch.Tensor, regions: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every cell of the label grid brings the token of the patch that it lies in."""
    batch_size, rows, columns, dim = tokens.shape
    found, present = torch.zeros(batch_size, count, dim), torch.zeros(batch_size, count, dtype=torch.bool)
    for i in range(batch_size):
        members: dict[int, list[torch.Tensor]] = {}
        for y in range(regions.shape[1]):
            for x in range(regions.shape[2]):
                token = tokens[i, y * rows // regions.shape[1], x * columns // regions.shape[2]]
                members.setdefault(int(regions[i, y, x]), []).append(token)
        for region in range(count):
            if region in members:
                found[i, region] = torch.stack(members[region]).mean(dim=0)
                present[i, region] = True
    return found, present
