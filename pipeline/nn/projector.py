"""The projection heads of GroupViT, OVSegmentor and ZeroSeg."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

HIDDEN = 4096  # Source: GroupViT's release


class SharedBatchNorm(nn.BatchNorm1d):
    """BatchNorm whose moments in training are those of all rows, where they lie in several processes.

    `share` gives mean, biased variance and number of all rows for this process's (`training.distributed`); None: these
    are all. torch's own SyncBatchNorm runs on GPUs alone.
    """

    share: Callable[[Tensor], tuple[Tensor, Tensor, int]] | None = None

    def forward(self, x: Float[Tensor, "rows width"]) -> Float[Tensor, "rows width"]:
        """Normalised columns."""
        if self.share is None or not self.training:
            return super().forward(x)
        with torch.autocast(x.device.type, enabled=False):
            mean, variance, count = self.share(x.float())
            with torch.no_grad():
                assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance * count / max(count - 1, 1), self.momentum)
                assert self.num_batches_tracked is not None
                self.num_batches_tracked += 1
            normalised = (x.float() - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
        return normalised.to(x.dtype)


class Projector(nn.Module):
    """Linear, BatchNorm, ReLU, Linear, applied to every vector; the output is not normalised.

    The release writes the linear layers as 1x1 convolutions. BatchNorm normalises over all leading axes together; its
    running statistics are used in eval mode.
    Source: GroupViT (card section 4).
    """

    def __init__(self, inside: int, outside: int, *, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.hidden = nn.Linear(inside, hidden)
        self.norm = SharedBatchNorm(hidden)
        self.activation = nn.ReLU()
        self.out = nn.Linear(hidden, outside)

    def forward(self, x: Float[Tensor, "*batch inside"]) -> Float[Tensor, "*batch outside"]:
        """Projected vectors."""
        hidden = self.hidden(x)
        hidden = self.norm(hidden.flatten(0, -2)).view_as(hidden)
        return self.out(self.activation(hidden))
