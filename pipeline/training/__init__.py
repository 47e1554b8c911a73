"""One training loop for the frozen towers and the methods.

    result = fit(model, loss, loader, optimisation, run=Run(...), device=..., after_step=...)

- `model`: everything whose state matters, in one `nn.Module` (a momentum teacher and its centre too): its whole
  `state_dict` is checkpointed, its parameters with `requires_grad` are optimised.
- `loss(batch, progress) -> {"total": ..., other terms}`: `total` is optimised, all are logged; scalars. Under bf16 and
  fp16 it runs inside autocast, so losses must leave it (`torch.autocast(..., enabled=False)` and `.float()`).
- `loader.batches(position)`: an endless iterator of `Loaded` from that sample on (`pipeline.datasets.pairs`), each of
  `optimisation.micro_batch` samples; a step takes `micro_batches` of them.
- `after_step(progress)`: momentum teachers and their like, once a step; it sees the new weights.

Budgets count images. A run of the same key continues from its last checkpoint bit for bit (CPU, same threads):
weights, their average, optimiser, the loss's scale, random states, the loader's position and the open row of the curve
are all saved. SIGTERM and SIGINT finish the step, save and end the process with 128 + the signal's number.

In a process group (`pipeline.training.distributed`) the loader gives each process its share of every batch, gradients
are averaged, and the first process writes; how many there are is in no key.
"""

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from pipeline.artifacts.weights import save_model
from pipeline.engine import SIGNAL_EXIT, Interrupted
from pipeline.machine import WandbMode, use_device
from pipeline.project import Project
from pipeline.training import distributed
from pipeline.training.curve import Clock, Curve
from pipeline.training.interrupts import stop_requests
from pipeline.training.optimiser import Optimisation, Precision, optimiser_of, resolve_precision
from pipeline.training.state import RunState, restore_state, save_state
from pipeline.training.steps import Hook, Loaded, Loader, Loss, NonFiniteLoss, Progress, Steps, counted_step
from pipeline.training.watching import Watch, gpu_memory

__all__ = ["FitResult", "Loaded", "NoBatch", "NonFiniteLoss", "Optimisation", "Progress", "Run", "fit"]


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
        board: TensorBoard's folder, or None for none.
        wandb: how Weights & Biases is told, see `Machine`; its folder is `wandb` beside the log.
        pictures: folder of a PNG per checkpoint, the regions of a few training images, or None for none.
        before: the curve of the phases before this one.
        keep: checkpoints that stay, the newest.
        best: config of a model folder `best` beside the checkpoints, written whenever the mean total between two
            checkpoints is the least so far; None for no such folder. No benchmark has a part in it.
        peak_flops: FLOP/s of the device, for the share that is used (MFU); 0 where it is not known.
    """

    name: str
    key: str
    checkpoints: Path
    curve: Path
    log: Path
    live: Path | None
    board: Path | None = None
    wandb: WandbMode = "no"
    pictures: Path | None = None
    before: str = ""
    keep: int = 1
    best: dict[str, Any] | None = None
    peak_flops: float = 0.0

    @classmethod
    def of(cls, project: Project, name: str, key: str, *, kind: str = "", best: dict[str, Any] | None = None) -> "Run":
        """The run's files in a checkout, as its machine wants them; `kind`: folder of its curve in reports/curves.

        `best` is heeded where machine.yaml asks for it.
        """
        machine, logs = project.machine, project.logs
        return cls(
            name=name,
            key=key,
            checkpoints=project.checkpoints(name, key),
            curve=project.root / "reports" / "curves" / kind / f"{name}.csv",
            log=logs / f"{name}.jsonl",
            live=logs / "dvclive" / name,
            board=logs / "tensorboard" / name if machine.tensorboard else None,
            wandb=machine.wandb,
            pictures=logs / "pictures" / name,
            keep=machine.keep_checkpoints,
            best=best if machine.keep_best else None,
            peak_flops=1e9 * machine.peak_gflops,
        )


@dataclass(frozen=True, slots=True)
class FitResult:
    """What the run did; `seconds` counts every process that worked on it, the rate only this one.

    `failed` samples did not decode; `skipped` steps updated nothing, because gradients overflowed in fp16.
    """

    images: int
    steps: int
    failed: int
    skipped: int
    seconds: float
    images_per_second: float
    data_wait: float
    precision: Precision


def fit(
    model: nn.Module,
    loss: Loss,
    loader: Loader,
    optimisation: Optimisation,
    *,
    run: Run,
    device: torch.device | str = "cpu",
    after_step: Hook | None = None,
) -> FitResult:
    """Train `model` in place until the budget is spent; see the module docstring. With `ema` it ends with the averages.

    The caller builds (and seeds) the model; `fit` seeds torch's generators for what is random in the steps.

    Raises:
        NonFiniteLoss: names the samples of the batch.
        NoBatch: another process has none; the checkpoint is written, as where this one has none and raises why.
        Interrupted: a signal came; the checkpoint is written.
    """
    use_device(str(device))
    device = torch.device(device)
    model.to(device).train()
    torch.manual_seed(optimisation.seed + distributed.rank())
    steps = Steps(
        model=model,
        loss=distributed.averaged(model, loss),
        optimiser=optimiser_of(model, optimisation),
        optimisation=optimisation,
        precision=resolve_precision(optimisation.precision, device),
        device=device,
        after_step=after_step,
    )
    state = restore_state(run.checkpoints, run.key, steps) or RunState(key=run.key)
    curve = Curve(run.curve, state.curve, run.before)
    places = {"log": run.log, "live": run.live, "board": run.board, "pictures": run.pictures}
    watch = Watch(run.name, run.key, curve.rows(), wandb=run.wandb, **places)
    batches = loader.batches(state.images)
    try:
        return _Fitting(steps, run, state, curve, watch).all(batches)
    finally:
        batches.close()  # type: ignore[attr-defined]
        watch.close()


class NoBatch(RuntimeError):
    """Another process has none, so that this one cannot go on either."""


class _Fitting:
    """A run under way: steps, rows, checkpoints.

    The parts of a step are taken when the step before is done. So where none come, such as from a store that cannot be
    reached, every process knows of it before it waits for the others' gradients, and what was done is saved.
    """

    def __init__(self, steps: Steps, run: Run, state: RunState, curve: Curve, watch: Watch) -> None:
        self.steps, self.run, self.state, self.curve, self.watch = steps, run, state, curve, watch
        self.settings = steps.optimisation
        self.clock = Clock(state.images, self.settings.images, run.peak_flops * distributed.ranks())
        self.before = state.seconds
        self.parts: list[Loaded] = []  # of the next step

    def all(self, batches: Iterator[Loaded]) -> FitResult:
        """Step until the budget is spent."""
        state, budget = self.state, self.settings.images
        self.watch.write(
            "start", run=self.run.name, key=self.run.key, images=state.images, precision=self.steps.precision
        )
        if state.images:
            self.watch.say(f"continues at {state.images:,} of {budget:,} images")
        with stop_requests() as stop:
            error = self._take(batches) if state.images < budget else None
            if error:
                raise error
            while state.images < budget:
                self._step(batches, stop)
        if distributed.leads():
            self.curve.publish()
        if self.steps.average:
            self.steps.model.load_state_dict(self.steps.weights())
        return FitResult(
            images=state.images,
            steps=state.step,
            failed=state.failed,
            skipped=state.skipped,
            seconds=self.before + self.clock.seconds,
            images_per_second=self.clock.rate(state.images),
            data_wait=self.clock.waited / self.clock.seconds,
            precision=self.steps.precision,
        )

    def _take(self, batches: Iterator[Loaded]) -> Exception | None:
        """The next step's parts, with the wait for them on the clock; or why they do not come."""
        asked = perf_counter()
        self.parts.clear()  # frees memory of the loader
        try:
            self.parts.extend(next(batches) for _ in range(self.settings.micro_batches))
        except Exception as error:
            return error
        self.clock.waited += perf_counter() - asked
        return None

    def _step(self, batches: Iterator[Loaded], stop: list[int]) -> None:
        state, settings, clock = self.state, self.settings, self.clock
        count = clock.peak > 0 and not clock.flops
        own, loaded, flops = counted_step(self.steps, self.parts, state.step, count=count)
        previous, state.images, state.step = state.images, loaded.position, state.step + 1
        last = state.images >= settings.images
        error = None if last else self._take(batches)
        values, totals = self._over_processes(own, [len(loaded.failures), bool(stop), error is not None, flops])
        failed, stopping, missing, flops = totals
        clock.flops = clock.flops or flops / (state.images - previous)
        state.means.add(values)
        state.recent.add({"total": values["total"]})
        state.failed += int(failed)
        if values.get("skipped"):
            state.skipped += 1
            self.watch.write("skipped_step", step=state.step, loss_scale=values["loss_scale"])
        for uid, reason in loaded.failures:
            self.watch.write("failed_sample", uid=uid, reason=reason)
        if last or _crossed(previous, state.images, settings.log_images):
            row = self.curve.append(state.step, state.images, state.means.take())
            rates = clock.row(state.images) | gpu_memory(self.steps.device)
            self.watch.row(row, rates, self.steps.model)
        if line := clock.line(state.images, values, force=last):
            self.watch.say(line)
        due = last or _crossed(previous, state.images, settings.checkpoint_images)
        if due:
            self._keep_best()
            self.watch.picture(self.steps.model, loaded.batch, state.images, self.steps.device)
        if due or stopping or missing:
            self._save()
        if stopping:
            number = stop[0] if stop else signal.SIGTERM
            self.watch.write("interrupted", signal=number, images=state.images)
            self.watch.say(f"interrupted, saved at {state.images:,} images; `dvc repro` continues there")
            raise Interrupted(SIGNAL_EXIT + number)
        if missing:
            self.watch.say(f"no batch came; saved at {state.images:,} images")
            raise error or NoBatch("another process of this training got no batch; its own error says why")

    def _over_processes(self, values: dict[str, float], counts: list[float]) -> tuple[dict[str, float], list[float]]:
        """Means of the terms and sums of the counts: the same on every process, so that all of them do the same."""
        totals = distributed.sums([*values.values(), *counts])
        means = [total / distributed.ranks() for total in totals[: len(values)]]
        return dict(zip(values, means, strict=True)), totals[len(values) :]

    def _keep_best(self) -> None:
        mean, state = self.state.recent.take()["total"], self.state
        if state.best is not None and mean >= state.best:
            return
        state.best = mean
        if self.run.best is not None and distributed.leads():
            about = {"trained": {"images": state.images, "mean_total": mean}}
            save_model(self.run.checkpoints / "best", self.steps.weights(), {**self.run.best, **about})

    def _save(self) -> None:
        state = self.state
        state.curve, state.seconds = self.curve.text, self.before + self.clock.seconds
        save_state(self.run.checkpoints, state, self.steps, self.run.keep)
        if distributed.leads():
            self.curve.publish()


def _crossed(before: int, after: int, every: int) -> bool:
    return before // every != after // every
