"""AdamW with parameter groups, and the learning rate as a function of images seen.

Budgets and schedules count images, not steps or minutes, so that a run means the same on every machine.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn

from pipeline.params import ParamsError, Range

Precision = Literal["fp32", "bf16", "fp16"]
Positive = Annotated[int, Range(1)]
Decayed = Literal["weights", "all_but_vectors"]
CosineFrom = Literal["warmup", "start"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimisation:
    """How a model is optimised; a block of params.yaml.

    Attributes:
        images: budget, in images seen.
        batch_size: images a step.
        micro_batches: equal parts of a batch whose gradients are averaged before the step, for the memory of one part.
            A loss that contrasts images has the whole batch's negatives (`pipeline.losses.parts`); batch statistics
            (BatchNorm, DINO's centres) are a part's.
        lr: peak learning rate of AdamW, for this batch size.
        lr_multipliers: factor on `lr` by prefix of parameter name.
        final_lr_fraction: share of `lr` at the end of the cosine.
        warmup_images: images of linear warm-up.
        cosine_from: whether the cosine starts after the warm-up or with the run, see `lr_factor`.
        weight_decay: of AdamW.
        decayed: what it acts on, see `parameter_groups`.
        betas: AdamW's moment decays.
        clip_norm: largest gradient norm of the whole model.
        ema: decay, at every step, of an exponential moving average of the trained weights, in float32, from the first
            weights on; it is what the run ends with. 0: none. Momentum teachers are not trained weights.
        precision: bf16 or fp16 = autocast with losses in fp32, and for fp16 with the loss scaled; falls back to fp32 on
            a CPU without instructions for it.
        checkpoint_images: images between two checkpoints.
        log_images: images between two rows of the curve.
        seed: of the weights, of the order and augmentation of the pairs, and of dropout.
    """

    images: Positive
    batch_size: Positive
    micro_batches: Positive
    lr: Annotated[float, Range(0, low_open=True)]
    lr_multipliers: dict[str, float]
    final_lr_fraction: Annotated[float, Range(0, 1)]
    warmup_images: Annotated[int, Range(0)]
    cosine_from: CosineFrom
    weight_decay: Annotated[float, Range(0)]
    decayed: Decayed
    betas: tuple[float, float]
    clip_norm: Annotated[float, Range(0, low_open=True)]
    ema: Annotated[float, Range(0, 1)]
    precision: Precision
    checkpoint_images: Positive
    log_images: Positive
    seed: Annotated[int, Range(0)]

    def __post_init__(self) -> None:
        if self.batch_size % self.micro_batches:
            raise ParamsError(
                f"optimisation.micro_batches: {self.batch_size} images make no {self.micro_batches} equal parts"
            )

    @property
    def micro_batch(self) -> int:
        """Images of one of a batch's parts, which is what a loader makes."""
        return self.batch_size // self.micro_batches


def parameter_groups(
    model: nn.Module, *, lr: float, weight_decay: float, lr_multipliers: dict[str, float], decayed: Decayed = "weights"
) -> list[dict]:
    """Groups of trainable parameters for AdamW; each holds `names` beside `params`, and `peak_lr` (its lr at the peak).

    `decayed` "weights": only matrices and filters called `weight`, not vectors and scalars (biases, norms,
    temperatures), embedding tables, or parameters under another name (position embeddings, tokens, queries); ours, for
    CLIP-style code decays such tables. "all_but_vectors": all but biases and what has just one axis; MAE's, GroupViT's
    and OVSegmentor's releases, whose position tables, tokens, embeddings and, having no axis, temperatures decay (card
    groupvit.md section 8).
    `lr_multipliers` maps a prefix of parameter names to a factor; the longest prefix that fits wins.

    Raises:
        ValueError: a prefix fits no trainable parameter, or nothing is trainable.
    """
    decaying = _weights(model) if decayed == "weights" else _all_but_vectors(model)
    groups: dict[tuple[float, float], dict] = {}
    used: set[str] = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        prefix = max((p for p in lr_multipliers if _starts(name, p)), key=len, default=None)
        if prefix is not None:
            used.add(prefix)
        peak = lr * (1.0 if prefix is None else lr_multipliers[prefix])
        decay = weight_decay if name in decaying else 0.0
        group = groups.setdefault((peak, decay), {"params": [], "names": [], "peak_lr": peak, "weight_decay": decay})
        group["params"].append(parameter)
        group["names"].append(name)
    unused = sorted(set(lr_multipliers) - used)
    if unused:
        raise ValueError(f"lr_multipliers: no trainable parameter is named {unused[0]!r}")
    if not groups:
        raise ValueError("the model has no trainable parameter")
    return list(groups.values())


def _starts(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def _all_but_vectors(model: nn.Module) -> set[str]:
    return {name for name, value in model.named_parameters() if value.ndim != 1 and not name.endswith(".bias")}


def _weights(model: nn.Module) -> set[str]:
    return {
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        for name, parameter in module.named_parameters(recurse=False)
        if name.endswith("weight") and parameter.ndim > 1 and not isinstance(module, nn.Embedding)
    }


def adamw(groups: list[dict], betas: tuple[float, float]) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; the fused kernel, which the CPU has too."""
    plain = [{k: g[k] for k in ("params", "names", "peak_lr", "weight_decay")} | {"lr": g["peak_lr"]} for g in groups]
    return torch.optim.AdamW(plain, betas=betas, fused=True)


def optimiser_of(model: nn.Module, settings: Optimisation) -> torch.optim.AdamW:
    """AdamW over the model's parameters as the settings group them. Raises ValueError: see `parameter_groups`."""
    groups = parameter_groups(
        model,
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        lr_multipliers=settings.lr_multipliers,
        decayed=settings.decayed,
    )
    return adamw(groups, settings.betas)


def lr_factor(
    images: int, *, budget: int, warmup: int, final_fraction: float, cosine_from: CosineFrom = "warmup"
) -> float:
    """Share of the peak learning rate after `images` images: linear from 0, then half a cosine to `final_fraction`.

    The first step of a run has `images` of one batch, so it is not zero. A cosine "from start" has run through the
    warm-up unseen, so that the rate falls a little where it takes over: timm's scheduler without `warmup_prefix`, with
    which GroupViT and OVSegmentor were trained (card groupvit.md section 8).
    """
    if images < warmup:
        return images / warmup
    first = warmup if cosine_from == "warmup" else 0
    done = min((images - first) / max(budget - first, 1), 1.0)
    return final_fraction + (1 - final_fraction) * 0.5 * (1 + math.cos(math.pi * done))


def resolve_precision(precision: Precision, device: torch.device) -> Precision:
    """The precision that will run: one that a CPU has no instructions for would be slower than fp32, so it is fp32."""
    native = {
        "fp32": lambda: True,
        "bf16": torch.ops.mkldnn._is_mkldnn_bf16_supported,
        "fp16": torch.ops.mkldnn._is_mkldnn_fp16_supported,
    }
    return precision if device.type != "cpu" or native[precision]() else "fp32"
