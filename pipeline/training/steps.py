"""One optimiser step at a time: forward, backward, clipping, update, and what they measured."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.training.optimiser import Optimisation, Precision, lr_factor


@dataclass(frozen=True, slots=True)
class Progress:
    """`step` counts finished optimiser steps, `images` the images seen with the current batch, of `budget`."""

    step: int
    images: int
    budget: int

    @property
    def fraction(self) -> float:
        """Share of the budget, in [0, 1]."""
        return min(self.images / self.budget, 1.0)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A batch with the loader's position after it (samples drawn, failed ones too) and the samples that failed."""

    batch: Any
    position: int
    failures: list[tuple[str, str]] = field(default_factory=list)


@runtime_checkable
class Loader(Protocol):
    """Endless batches from a position on; closing the iterator ends its threads."""

    def batches(self, position: int) -> Iterator[Loaded]: ...


class NonFiniteLoss(RuntimeError):
    """A loss or gradient became NaN or infinite; the message names the step, the terms and the samples."""


Hook = Callable[[Progress], None]
Loss = Callable[[Any, Progress], dict[str, Tensor]]


@dataclass(slots=True, kw_only=True)
class Steps:
    """The steps of one `fit`; its arguments are those of `fit`, with the optimiser and the precision that will run."""

    model: nn.Module
    loss: Loss
    optimiser: torch.optim.AdamW
    optimisation: Optimisation
    precision: Precision
    device: torch.device
    before_step: Hook | None = None
    after_step: Hook | None = None

    def step(self, loaded: Loaded, done: int) -> dict[str, float]:
        """Forward, backward, update; returns every term, the learning rate and the gradient's norm.

        The device is waited for once, after everything was asked of it.

        Raises:
            NonFiniteLoss: the weights are spoiled; the last checkpoint is not.
        """
        settings = self.optimisation
        progress = Progress(done, loaded.position, settings.images)
        factor = lr_factor(
            loaded.position,
            budget=settings.images,
            warmup=settings.warmup_images,
            final_fraction=settings.final_lr_fraction,
        )
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak_lr"] * factor
        if self.before_step:
            self.before_step(progress)
        batch = loaded.batch.to(self.device)
        self.optimiser.zero_grad(set_to_none=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            terms = self.loss(batch, progress)
        terms["total"].backward()
        trained = [p for group in self.optimiser.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        self.optimiser.step()
        if self.after_step:
            self.after_step(Progress(done + 1, loaded.position, settings.images))
        measured = torch.stack([value.detach().double() for value in (*terms.values(), norm)]).tolist()
        values = dict(zip((*terms, "grad_norm"), measured, strict=True))
        _demand_finite(values, batch.uids, done)
        return {**{name: values[name] for name in terms}, "lr": settings.lr * factor, "grad_norm": values["grad_norm"]}


def counted_step(steps: Steps, loaded: Loaded, done: int, *, count: bool) -> tuple[dict[str, float], float]:
    """A step and, where wanted, the operations of its matrix products and convolutions on this process, else 0.

    Compiled blocks run uncompiled in a counted step, since a compiler hides their operations.
    """
    if not count:
        return steps.step(loaded, done), 0.0
    with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
        values = steps.step(loaded, done)
    return values, float(counter.get_total_flops())


def _demand_finite(values: dict[str, float], uids: list[str], done: int) -> None:
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        raise NonFiniteLoss(f"step {done + 1}: {bad} on the samples {', '.join(uids)}")
