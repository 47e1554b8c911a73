"""One optimiser step at a time: forward and backward over the parts of a batch, clipping, update, and the measures."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pipeline.losses.parts import Parts
from pipeline.nn.matching import BadCost
from pipeline.training import distributed
from pipeline.training.average import Average
from pipeline.training.compiling import computed_once
from pipeline.training.optimiser import Optimisation, Precision, lr_factor


@dataclass(frozen=True, slots=True)
class Progress:
    """`step` counts finished optimiser steps, `images` those seen with the current part of a batch, of `budget`."""

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

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(slots=True, kw_only=True)
class Steps:
    """The steps of one `fit`; its arguments are those of `fit`, with the optimiser and the precision that will run.

    `scaler` multiplies losses for fp16 and is idle otherwise; `average` is None where `optimisation.ema` is 0; `shares`
    says whether a loss means all parts of a batch, as far as is known.
    """

    model: nn.Module
    loss: Loss
    optimiser: torch.optim.AdamW
    optimisation: Optimisation
    precision: Precision
    device: torch.device
    after_step: Hook | None = None
    scaler: torch.amp.GradScaler = field(init=False)
    average: Average | None = field(init=False)
    shares: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.average = Average(self.model, self.optimisation.ema) if self.optimisation.ema else None

    def weights(self) -> dict[str, Tensor]:
        """The state of the model that the run is for: with the averages, where there are any."""
        return self.average.state() if self.average else self.model.state_dict()

    def step(self, every: Sequence[Loaded], done: int) -> tuple[dict[str, float], Loaded]:
        """Forward and backward over every part of a batch, one at a time, and an update.

        Returns every term (its mean over the parts), the learning rate and the gradient's norm; and the last part, with
        the failures of all. Where fp16 is asked for also `loss_scale`, and `skipped`: 1 where a gradient overflowed at
        that scale, so that nothing was updated (its norm counts as 0) and the next scale is smaller; else 0.

        A batch in parts has the negatives of the whole, for one more forward pass of each (`pipeline.losses.parts`);
        BatchNorm sees a part at a time.

        The device is waited for once, after everything was asked of it (by fp16's scaler too, before it updates).

        Raises:
            NonFiniteLoss: the weights are spoiled; the last checkpoint is not. Also where gradients overflow unscaled,
                and where masks have diverged, so that they match nothing.
        """
        settings, scale = self.optimisation, self.scaler.get_scale()
        self.optimiser.zero_grad(set_to_none=True)
        terms: dict[str, list[Tensor]] = {}
        uids, failures = [], []
        parts = self._parts(every, done)
        for number, loaded in enumerate(every):
            batch = loaded.batch.to(self.device)
            with distributed.averaging(self.loss, number + 1 == len(every)):
                with parts.of(number) if parts.asked else nullcontext():
                    found = self._forward(batch, done, loaded.position)
                self.scaler.scale(found["total"] / settings.micro_batches).backward()
            for name, value in found.items():
                terms.setdefault(name, []).append(value.detach().double())
            uids += batch.uids
            failures += loaded.failures
        rate, norm = self._update(loaded.position)
        if self.after_step:
            self.after_step(Progress(done + 1, loaded.position, settings.images))
        if self.average:
            self.average.follow()
        means = [torch.stack(values).mean() for values in terms.values()]
        *measured, size = torch.stack([*means, norm.double()]).tolist()
        skipped = self.scaler.get_scale() < scale
        values = dict(zip(terms, measured, strict=True))
        values |= {"lr": rate, "grad_norm": 0.0 if skipped and scale > 1 else size}
        _demand_finite(values, uids, done)
        if settings.precision == "fp16":
            values |= {"loss_scale": scale, "skipped": float(skipped)}
        return values, Loaded(loaded.batch, loaded.position, failures)

    def _parts(self, every: Sequence[Loaded], done: int) -> Parts:
        """The losses that mean the rows of all parts; none where no loss does, or where there is one part.

        Random draws and running statistics are as if the features had not been computed before.
        """
        parts, uids = Parts(len(every)), []
        if len(every) == 1 or not self.shares:
            return parts
        with self._unseen(), torch.no_grad(), distributed.averaging(self.loss, False):
            for number, loaded in enumerate(every):
                batch = loaded.batch.to(self.device)
                uids += batch.uids
                with parts.of(number):
                    self._forward(batch, done, loaded.position)
                self.shares = parts.asked
                if not self.shares:
                    break
            with _naming(uids, done):
                parts.solve()
        return parts

    @contextmanager
    def _unseen(self) -> Iterator[None]:
        """Inside, random draws and running statistics are as if there had been none."""
        buffers = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            yield
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)

    def operations(self, loaded: Loaded, done: int) -> float:
        """Of the matrix products and convolutions of this part, forward and backward, on this process.

        Nothing is counted twice: blocks run uncompiled, since a compiler hides their operations, and are computed once;
        what that keeps for the backward pass waits on the host, in case recomputed blocks were needed. A pass for its
        own sake: it changes nothing but drops the gradients of the step before.
        """
        self.optimiser.zero_grad(set_to_none=True)
        kept = torch.autograd.graph.save_on_cpu() if self.device.type == "cuda" else nullcontext()
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            with self._unseen(), computed_once(self.model), distributed.averaging(self.loss, False), kept:
                self._forward(loaded.batch.to(self.device), done, loaded.position)["total"].backward()
        self.optimiser.zero_grad(set_to_none=True)
        return float(counter.get_total_flops())

    def _forward(self, batch: Any, done: int, position: int) -> dict[str, Tensor]:
        autocast = torch.autocast(self.device.type, AUTOCAST.get(self.precision), enabled=self.precision in AUTOCAST)
        with autocast, _naming(batch.uids, done):
            return self.loss(batch, Progress(done, position, self.optimisation.images))

    def _update(self, position: int) -> tuple[float, Tensor]:
        """Clip and update at that position; the learning rate, and the gradient's norm before clipping."""
        settings = self.optimisation
        factor = lr_factor(
            position,
            budget=settings.images,
            warmup=settings.warmup_images,
            final_fraction=settings.final_lr_fraction,
            cosine_from=settings.cosine_from,
        )
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak_lr"] * factor
        self.scaler.unscale_(self.optimiser)
        trained = [p for group in self.optimiser.param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return settings.lr * factor, norm


def counted_step(
    steps: Steps, every: Sequence[Loaded], done: int, *, count: bool
) -> tuple[dict[str, float], Loaded, float]:
    """A step and, where wanted, the operations that it takes at least on this process (`Steps.operations`), else 0.

    They are counted after the step: what a model computes once and keeps is there, and is not counted.
    """
    values, loaded = steps.step(every, done)
    return values, loaded, len(every) * steps.operations(every[-1], done) if count else 0.0


@contextmanager
def _naming(uids: Sequence[str], done: int) -> Iterator[None]:
    """Turns a matching that cannot be into an error that names the samples."""
    try:
        yield
    except BadCost as error:
        bad = ", ".join(uids[image] for image in error.images)
        raise NonFiniteLoss(f"step {done + 1}: the matching cost is not finite on the samples {bad}") from error


def _demand_finite(values: dict[str, float], uids: list[str], done: int) -> None:
    bad = {name: value for name, value in values.items() if not math.isfinite(value)}
    if bad:
        raise NonFiniteLoss(f"step {done + 1}: {bad} on the samples {', '.join(uids)}")
