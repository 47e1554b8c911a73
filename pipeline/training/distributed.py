"""One training spread over processes that `torchrun` started: each works on its share of every batch.

A loss that is a mean over own rows, averaged over processes as DDP averages gradients, has the gradient of the mean
over all rows once the features are gathered, BatchNorm sees all rows, and means over other things than rows are
balanced. Without a process group everything here is that of one process.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from pipeline.losses.parts import counted
from pipeline.machine import use_device
from pipeline.nn.projector import SharedBatchNorm

# torch's backend by kind of tensor: counts are exchanged between hosts, without waiting for a GPU.
BACKENDS = "cpu:gloo,cuda:nccl"


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """The device of this process, in the group that torchrun's variables describe; without them, `device` alone.

    Under torchrun every process of a host takes the GPU of its number, where `device` is a GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        use_device(device)
        yield device
        return
    if device.startswith("cuda"):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    use_device(device)
    dist.init_process_group(BACKENDS if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def ranks() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if ranks() > 1 else 0


def local_ranks() -> int:
    """How many of them are on this host."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks() > 1 else 1


def leads() -> bool:
    """Whether this is the process that writes files."""
    return rank() == 0


def wait_for_all() -> None:
    """Until every process is here."""
    if ranks() > 1:
        dist.barrier()


def sums(numbers: list[float]) -> list[float]:
    """Each number summed over processes, in float64."""
    if ranks() == 1:
        return numbers
    total = torch.tensor(numbers, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


class _Whole(nn.Module):
    """Model and loss as one module, whose forward pass DDP can follow."""

    def __init__(self, model: nn.Module, loss: Callable[..., dict[str, Tensor]]) -> None:
        super().__init__()
        self.model, self._loss = model, loss

    def forward(self, *inputs: Any) -> dict[str, Tensor]:
        """The terms."""
        return self._loss(*inputs)


def averaged(model: nn.Module, loss: Callable[..., dict[str, Tensor]]) -> Callable[..., dict[str, Tensor]]:
    """The loss, such that its backward pass leaves every process the mean of all their gradients."""
    if ranks() == 1:
        return loss
    for module in model.modules():
        if isinstance(module, SharedBatchNorm):
            module.share = shared_moments
    return nn.parallel.DistributedDataParallel(_Whole(model, loss), forward_sync_buffers=False)


def averaging(loss: Callable[..., dict[str, Tensor]], now: bool) -> AbstractContextManager[Any]:
    """Around forward and backward of what `averaged` returned: where not `now`, gradients gather in this process alone.

    The first backward pass with `now` leaves the mean over processes of everything that has gathered.
    """
    waits = isinstance(loss, nn.parallel.DistributedDataParallel) and not now
    return loss.no_sync() if waits else nullcontext()


class _AllGather(torch.autograd.Function):
    """Rows of every process, by rank; backwards, each process's own rows with the gradients of all losses summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: list[int]) -> Tensor:
        largest = max(counts)
        padded = F.pad(rows, (*(0, 0) * (rows.ndim - 1), 0, largest - len(rows))).contiguous()
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        first = sum(counts[: dist.get_rank()])
        ctx.own = slice(first, first + len(rows))
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.own], None


def gather_rows(rows: Shaped[Tensor, "rows ..."]) -> tuple[Shaped[Tensor, "all ..."], int]:
    """The rows of every process and the position of the first own row.

    Gradients flow back to the process a row came from. With the average that DDP takes over processes, a loss that is a
    mean over own rows then has the gradient of the mean over all rows, where every process has as many (a failed sample
    makes those of its process count a little more); a gather without gradients is another estimator.
    Source: GroupViT's release; card groupvit.md section 5.
    """
    if ranks() == 1:
        return rows, 0
    counts = row_counts(len(rows))
    gathered = _AllGather.apply(rows, counts)
    assert isinstance(gathered, Tensor)
    return gathered, sum(counts[: rank()])


def row_counts(own: int) -> list[int]:
    """How many rows each process has."""
    mine = torch.zeros(ranks(), dtype=torch.int64)
    mine[rank()] = own
    if ranks() > 1:
        dist.all_reduce(mine)
    return mine.tolist()


def summed(counts: Shaped[Tensor, "*shape"]) -> Shaped[Tensor, "*shape"]:
    """Sums over processes, without gradients."""
    if ranks() == 1:
        return counts
    total = counts.detach().clone()
    dist.all_reduce(total)
    return total


def balanced(mean: Float[Tensor, ""], count: Shaped[Tensor, ""]) -> Float[Tensor, ""]:
    """A mean over `count` own things, weighed so that the mean over processes and parts is that over all things."""
    parts, total = counted(count)
    shares = parts * ranks()
    return mean if shares == 1 else mean * (count * shares / summed(total).clamp(min=1))


class _Sum(torch.autograd.Function):
    """Sum over processes; backwards, the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total


def shared_moments(x: Float[Tensor, "rows width"]) -> tuple[Float[Tensor, " width"], Float[Tensor, " width"], int]:
    """Mean and (biased) variance of every column over the rows of all processes, with gradients, and their number."""
    count = sum(row_counts(len(x)))
    mean = _Sum.apply(x.sum(dim=0)) / count  # type: ignore[operator]
    variance = _Sum.apply((x - mean).square().sum(dim=0)) / count  # type: ignore[operator]
    return mean, variance, count
