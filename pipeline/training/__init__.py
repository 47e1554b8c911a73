"""One training loop for the frozen towers and the methods.

    result = fit(model, loss, loader, optimisation, run=Run(...), device=..., before_step=..., after_step=...)

- `model`: everything whose state matters, in one `nn.Module` (a momentum teacher and its centre too): its whole
  `state_dict` is checkpointed, its parameters with `requires_grad` are optimised.
- `loss(batch, progress) -> {"total": ..., other terms}`: `total` is optimised, all are logged; scalars. Under bf16 it
  runs inside autocast, so losses must leave it (`torch.autocast(..., enabled=False)` and `.float()`).
- `loader.batches(position)`: an endless iterator of `Loaded` from that sample on (`pipeline.datasets.pairs`).
- `before_step(progress)` and `after_step(progress)`: schedules and moving averages; `after_step` sees the new weights.

Budgets count images. A run of the same key continues from its last checkpoint bit for bit (CPU, same threads):
weights, optimiser, random states, the loader's position and the open row of the curve are all saved. SIGTERM and
SIGINT finish the step, save and end the process with 128 + the signal's number.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from pipeline.engine import SIGNAL_EXIT, Interrupted
from pipeline.params import Range
from pipeline.training.curve import Clock, Curve, LivePlot, Log, say
from pipeline.training.interrupts import stop_requests
from pipeline.training.optimiser import (
    Decayed,
    Positive,
    Precision,
    adamw,
    lr_factor,
    parameter_groups,
    resolve_precision,
)
from pipeline.training.state import RunState, restore_state, save_state

__all__ = ["FitResult", "Loaded", "NonFiniteLoss", "Optimisation", "Progress", "Run", "fit"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimisation:
    """How a model is optimised; a block of params.yaml.

    Attributes:
        images: budget, in images seen.
        batch_size: images a step.
        lr: peak learning rate of AdamW, for this batch size.
        lr_multipliers: factor on `lr` by prefix of parameter name.
        final_lr_fraction: share of `lr` at the end of the cosine.
        warmup_images: images of linear warm-up.
        weight_decay: of AdamW.
        decayed: what it acts on, see `parameter_groups`.
        betas: AdamW's moment decays.
        clip_norm: largest gradient norm of the whole model.
        precision: bf16 = autocast with losses in fp32; falls back to fp32 on a CPU without bf16 instructions.
        checkpoint_images: images between two checkpoints.
        log_images: images between two rows of the curve.
        seed: of the weights, of the order and augmentation of the pairs, and of dropout.
    """

    images: Positive
    batch_size: Positive
    lr: Annotated[float, Range(0, low_open=True)]
    lr_multipliers: dict[str, float]
    final_lr_fraction: Annotated[float, Range(0, 1)]
    warmup_images: Annotated[int, Range(0)]
    weight_decay: Annotated[float, Range(0)]
    decayed: Decayed
    betas: tuple[float, float]
    clip_norm: Annotated[float, Range(0, low_open=True)]
    precision: Precision
    checkpoint_images: Positive
    log_images: Positive
    seed: Annotated[int, Range(0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """Where a run keeps its files.

    Attributes:
        name: shown in the progress line, such as `sseg`.
        key: digest of what decides the weights; a checkpoint of another key is never resumed.
        checkpoints: folder of this key's checkpoints (`Project.checkpoints(name, key)`).
        curve: the CSV, such as reports/curves/sseg.csv.
        log: JSON lines with times, such as logs/sseg.jsonl.
        live: DVCLive's folder, or None for none.
        before: the curve of the phases before this one.
    """

    name: str
    key: str
    checkpoints: Path
    curve: Path
    log: Path
    live: Path | None
    before: str = ""


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


@dataclass(frozen=True, slots=True)
class FitResult:
    """What the run did; `seconds` counts every process that worked on it, the rate only this one."""

    images: int
    steps: int
    failed: int
    seconds: float
    images_per_second: float
    data_wait: float
    precision: Precision


class NonFiniteLoss(RuntimeError):
    """A loss or gradient became NaN or infinite; the message names the step, the terms and the samples."""


Hook = Callable[[Progress], None]


def fit(
    model: nn.Module,
    loss: Callable[[Any, Progress], dict[str, Tensor]],
    loader: Loader,
    optimisation: Optimisation,
    *,
    run: Run,
    device: torch.device | str = "cpu",
    before_step: Hook | None = None,
    after_step: Hook | None = None,
) -> FitResult:
    """Train `model` in place until the budget is spent; see the module docstring.

    The caller builds (and seeds) the model; `fit` seeds torch's generators for what is random in the steps.

    Raises:
        NonFiniteLoss: names the samples of the batch.
        Interrupted: a signal came; the checkpoint is written.
    """
    device = torch.device(device)
    model.to(device).train()
    groups = parameter_groups(
        model,
        lr=optimisation.lr,
        weight_decay=optimisation.weight_decay,
        lr_multipliers=optimisation.lr_multipliers,
        decayed=optimisation.decayed,
    )
    optimiser = adamw(groups, optimisation.betas)
    torch.manual_seed(optimisation.seed)
    state = restore_state(run.checkpoints, run.key, model, optimiser) or RunState(key=run.key)
    precision = resolve_precision(optimisation.precision, device)
    loop = _Loop(model, loss, optimiser, optimisation, precision, device, before_step, after_step)
    return _run(loop, loader, run, state)


@dataclass(slots=True)
class _Loop:
    """One optimiser step at a time."""

    model: nn.Module
    loss: Callable[[Any, Progress], dict[str, Tensor]]
    optimiser: torch.optim.AdamW
    optimisation: Optimisation
    precision: Precision
    device: torch.device
    before_step: Hook | None
    after_step: Hook | None

    def step(self, loaded: Loaded, done: int) -> dict[str, float]:
        """Forward, backward, update; returns every term, the learning rate and the gradient's norm."""
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
        values = {name: float(term.detach()) for name, term in terms.items()}
        self._demand_finite(values, batch, done)
        terms["total"].backward()
        trained = [p for group in self.optimiser.param_groups for p in group["params"]]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm))
        self._demand_finite({"grad_norm": norm}, batch, done)
        self.optimiser.step()
        if self.after_step:
            self.after_step(Progress(done + 1, loaded.position, settings.images))
        return {**values, "lr": settings.lr * factor, "grad_norm": norm}

    def _demand_finite(self, values: dict[str, float], batch: Any, done: int) -> None:
        bad = {name: value for name, value in values.items() if not math.isfinite(value)}
        if bad:
            raise NonFiniteLoss(f"step {done + 1}: {bad} on the samples {', '.join(batch.uids)}")


def _run(loop: _Loop, loader: Loader, run: Run, state: RunState) -> FitResult:
    settings = loop.optimisation
    curve = Curve(run.curve, state.curve, run.before)
    log, live = Log(run.log), LivePlot(run.live, curve.rows())
    clock = Clock(state.images, settings.images)
    before = state.seconds
    log.write("start", run=run.name, key=run.key, images=state.images, precision=loop.precision)
    if state.images:
        say(f"{run.name}: continues at {state.images:,} of {settings.images:,} images")

    def save() -> None:
        state.curve, state.seconds = curve.text, before + clock.seconds
        save_state(run.checkpoints, state, loop.model, loop.optimiser)
        curve.publish()

    batches = loader.batches(state.images)
    try:
        with stop_requests() as stop:
            while state.images < settings.images:
                asked = perf_counter()
                loaded = next(batches)
                clock.waited += perf_counter() - asked
                values = loop.step(loaded, state.step)
                previous, state.images, state.step = state.images, loaded.position, state.step + 1
                state.means.add(values)
                _report_failures(loaded, state, log)
                last = state.images >= settings.images
                if last or _crossed(previous, state.images, settings.log_images):
                    _write_row(state, curve, live, log, clock)
                if line := clock.line(state.images, values, force=last):
                    say(f"{run.name}: {line}")
                if last or stop or _crossed(previous, state.images, settings.checkpoint_images):
                    save()
                if stop:
                    log.write("interrupted", signal=stop[0], images=state.images)
                    say(f"{run.name}: interrupted, saved at {state.images:,} images; `dvc repro` continues there")
                    raise Interrupted(SIGNAL_EXIT + stop[0])
    finally:
        batches.close()  # type: ignore[attr-defined]
        live.close()
        log.close()
    curve.publish()
    return FitResult(
        images=state.images,
        steps=state.step,
        failed=state.failed,
        seconds=before + clock.seconds,
        images_per_second=clock.rate(state.images),
        data_wait=clock.waited / clock.seconds,
        precision=loop.precision,
    )


def _crossed(before: int, after: int, every: int) -> bool:
    return before // every != after // every


def _write_row(state: RunState, curve: Curve, live: LivePlot, log: Log, clock: Clock) -> None:
    means = state.means.take()
    live.log(curve.append(state.step, state.images, means))
    log.write("row", step=state.step, images=state.images, **clock.row(state.images), **means)


def _report_failures(loaded: Loaded, state: RunState, log: Log) -> None:
    state.failed += len(loaded.failures)
    for uid, reason in loaded.failures:
        log.write("failed_sample", uid=uid, reason=reason)
