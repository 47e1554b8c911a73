"""Bytes of a training step at the papers' sizes, and the batch that fits one GPU; counted on the CPU.

    python -m benchmarks memory
    python -m benchmarks.bench_memory --memory 24G --methods groupvit sseg --side 448

Real steps of two small batches, bfloat16, with a GPU's attention, every text as long as the context; the tensors alive
at once make a line over the batch (`pipeline.planning.memory`). Beside it what a step allocated on a GPU
(reports/gpu.md), where it was measured.
"""

import argparse
import gc
import math

import torch

from benchmarks.bench_training import CONTEXT, batch_for
from benchmarks.paper import paper_config
from pipeline import methods
from pipeline.cli.fit_batch import GIB
from pipeline.cli.sizes import parse_size
from pipeline.planning.memory import Fit, Spent, count, largest_counted
from pipeline.training import Optimisation
from pipeline.training.compiling import recompute_blocks
from pipeline.training.optimiser import adamw, parameter_groups
from pipeline.training.steps import Loaded, Steps

COUNTED = (2, 4)
# Source: reports/gpu.md, uncompiled bfloat16, 224 px, texts of `KNOWN` tokens: images of a step, GiB.
KNOWN = 12
ALLOCATED = {
    "groupvit": (256, 9.8),
    "ovsegmentor": (128, 11.2),
    "zeroseg": (128, 11.6),
    "sseg": (128, 21.9),
    "pseudo_mask_vit": (128, 4.7),
}
# Only what a step reads of it matters here.
SETTINGS = Optimisation(
    images=10**6,
    batch_size=1,
    lr=1e-4,
    lr_multipliers={},
    final_lr_fraction=0.0,
    warmup_images=0,
    cosine_from="warmup",
    weight_decay=0.05,
    decayed="weights",
    betas=(0.9, 0.999),
    clip_norm=5.0,
    micro_batches=1,
    ema=0.0,
    precision="bf16",
    checkpoint_images=10**6,
    log_images=10**6,
    seed=0,
)


def fitted(name: str, memory: float, *, recompute: bool, side: int | None, tokens: int) -> Fit:
    """The batch of a method at its paper's size that fits into `memory` bytes."""
    config = paper_config(name, *([f"train.{name}.augmentation.image_size={side}"] if side else []))
    torch.manual_seed(0)
    model = methods.get(name).build(config, None).train()
    if recompute:
        recompute_blocks(model)

    def spend(images: int) -> Spent:
        groups = parameter_groups(model, lr=1e-4, weight_decay=0.05, lr_multipliers={})
        steps = Steps(
            model=model,
            loss=lambda batch, _: model.loss(batch),
            optimiser=adamw(groups, SETTINGS.betas),
            optimisation=SETTINGS,
            precision="bf16",
            device=torch.device("cpu"),
        )
        batch = batch_for(name, model, config, images, tokens)
        return count(steps, Loaded(batch, images), held=[])

    return largest_counted(spend, memory, COUNTED)


def main() -> None:
    """Print a row per method, without and with recomputed blocks."""
    parser = argparse.ArgumentParser(description="bytes of training steps at the papers' sizes")
    parser.add_argument(
        "--memory", type=parse_size, default=24 * GIB, metavar="SIZE", help="of the GPU (default 24 GiB)"
    )
    parser.add_argument("--methods", nargs="*", choices=sorted(ALLOCATED), default=sorted(ALLOCATED))
    parser.add_argument("--side", type=int, help="pixels, instead of the paper's 224 (S-Seg, pseudo-mask ViT)")
    parser.add_argument("--tokens", type=int, default=CONTEXT, help=f"of every text (default {CONTEXT}, the most)")
    options = parser.parse_args()
    print(f"GiB of a step, and images a step that fit into {options.memory / GIB:.1f} GiB")
    print(f"  {'':34s} without images  an image  images that fit   counted at / allocated at")
    for name in options.methods:
        for recompute in (False, True):
            found = fitted(name, options.memory, recompute=recompute, side=options.side, tokens=options.tokens)
            none, each = found.bytes_of(0) / GIB, (found.bytes_of(1) - found.bytes_of(0)) / GIB
            images, measured = ALLOCATED.get(name, (0, math.nan))
            compared = f"{found.bytes_of(images) / GIB:6.1f} / {measured:.1f} GiB at {images}"
            label = f"{name}, recomputed blocks" if recompute else name
            known = not recompute and options.side is None and options.tokens == KNOWN
            print(
                f"  {label:34s} {none:14.2f} {each:9.4f} {found.images:16,}   {compared if known else ''}", flush=True
            )
            gc.collect()


if __name__ == "__main__":
    main()
