"""Batches spread over processes: the features of all of them, with gradients.

A process group is the caller's business; without one there is one process.
"""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor


class _AllGather(torch.autograd.Function):
    """Rows of every process, by rank; backwards, each process's own rows with the gradients of all losses summed."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        ctx.own = slice(dist.get_rank() * len(rows), (dist.get_rank() + 1) * len(rows))
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.own]


def gather_rows(rows: Float[Tensor, "rows dim"]) -> tuple[Float[Tensor, "all dim"], int]:
    """The rows of every process and the position of the first own row; every process must have as many.

    Gradients flow back to the process a row came from. With the average that DDP takes over processes, a loss that is a
    mean over own rows then has the gradient of the mean over all rows; a gather without gradients is another estimator.
    Source: GroupViT's release; card groupvit.md section 5.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return rows, 0
    gathered = _AllGather.apply(rows)
    assert isinstance(gathered, Tensor)
    return gathered, dist.get_rank() * len(rows)
