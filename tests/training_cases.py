"""A toy model, batches decided by their position, a run of the training loop over them, and single steps."""

import math
import os
import signal
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.training import Loaded, Optimisation, Run, fit
from pipeline.training.optimiser import optimiser_of
from pipeline.training.steps import Steps

OPTIMISATION = Optimisation(
    images=96,
    batch_size=8,
    lr=0.01,
    lr_multipliers={"head": 2.0},
    final_lr_fraction=0.1,
    warmup_images=16,
    cosine_from="warmup",
    weight_decay=0.1,
    decayed="weights",
    betas=(0.9, 0.99),
    clip_norm=1.0,
    micro_batches=1,
    ema=0.0,
    precision="fp32",
    checkpoint_images=32,
    log_images=24,
    seed=3,
)


@dataclass
class ToyBatch:
    x: Tensor
    uids: list[str]

    def to(self, device):
        return ToyBatch(self.x.to(device), self.uids)


class ToyLoader:
    """Batches decided by the position alone; at `bad` a batch holds a NaN, at `stop_at` a signal arrives."""

    def __init__(self, bad: int | None = None, stop_at: int | None = None, number: int = signal.SIGTERM):
        self.bad, self.stop_at, self.number, self.asked = bad, stop_at, number, []

    def batches(self, position):
        while True:
            self.asked.append(position)
            x = torch.randn(8, 5, generator=torch.Generator().manual_seed(position))
            if position == self.bad:
                x[2, 0] = float("nan")
            if position == self.stop_at:
                os.kill(os.getpid(), self.number)
            position += 8
            yield Loaded(ToyBatch(x, [f"uid{position + i}" for i in range(8)]), position, [])


class Toy(nn.Module):
    """Dropout (random state), a buffer that an `after_step` hook moves, a frozen teacher and a norm."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(5, 6)
        self.norm = nn.LayerNorm(6)
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(6, 2)
        self.token = nn.Parameter(torch.zeros(1, 5))
        self.teacher = nn.Linear(5, 6).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(6))

    def loss(self, batch, progress):
        hidden = self.dropout(self.norm(self.body(batch.x + self.token)))
        far = (hidden - self.teacher(batch.x) - self.centre).square().mean()
        small = self.head(hidden).square().mean()
        return {"far": far, "small": small, "total": far + small}

    def after(self, progress):
        with torch.no_grad():
            self.centre.lerp_(self.body.bias, 0.1)
            self.teacher.weight.lerp_(self.body.weight, 0.1 * (1 - progress.fraction))


def toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def run_at(folder, key="k" * 8) -> Run:
    return Run(
        name="toy",
        key=key,
        checkpoints=folder / "checkpoints" / key,
        curve=folder / "toy.csv",
        log=folder / "toy.jsonl",
        live=None,
    )


def train(folder, loader=None, optimisation=OPTIMISATION, key="k" * 8):
    model = toy()
    result = fit(
        model, model.loss, loader or ToyLoader(), optimisation, run=run_at(folder, key), after_step=model.after
    )
    return model, result


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Killed(BaseException):
    """Stands for kill -9: nothing is saved on the way out."""


class KilledLoader(ToyLoader):
    def __init__(self, last: int = 56):
        super().__init__()
        self.last = last

    def batches(self, position):
        for loaded in super().batches(position):
            if loaded.position > self.last:
                raise Killed
            yield loaded


class Rows:
    """Batches of `size` rows, each decided by its number alone; a process of several has its part of them."""

    def __init__(self, size: int, last: int = 10**9, bad: int = -1, share: tuple[int, int] = (0, 1)):
        self.size, self.last, self.bad, self.share, self.asked = size, last, bad, share, []

    def batches(self, position):
        number, count = self.share
        while True:
            if position + self.size > self.last:
                raise Killed
            self.asked.append(position)
            part = range(position + number * self.size // count, position + (number + 1) * self.size // count)
            rows = [torch.randn(5, generator=torch.Generator().manual_seed(row)) for row in part]
            if self.bad in part:
                rows[0] = rows[0] * math.nan
            position += self.size
            yield Loaded(ToyBatch(torch.stack(rows), [f"uid{row}" for row in part]), position)


class Eight:
    """The same eight pairs at every step."""

    def __init__(self, data):
        self.data = data

    def batches(self, position):
        while True:
            position += 8
            yield Loaded(self.data, position, [])


def steps_of(model: Any, **settings: Any) -> Steps:
    optimisation = replace(OPTIMISATION, lr_multipliers={}, clip_norm=1e9, **settings)
    return Steps(
        model=model,
        loss=lambda data, _: model.loss(data),
        optimiser=optimiser_of(model, optimisation),
        optimisation=optimisation,
        precision=optimisation.precision,
        device=torch.device("cpu"),
    )
