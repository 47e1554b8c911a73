"""The projection heads of GroupViT, OVSegmentor and ZeroSeg."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.artifacts.files import BadInput
from pipeline.params import ParamsError

HIDDEN = 4096  # Source: GroupViT's release


def demand_rows(images: int, where: str) -> None:
    """Raises ParamsError: BatchNorm would see one image at a time. `where` names the block that sets their number."""
    if images < 2:
        raise ParamsError(f"{where}: batch_size / micro_batches must be above 1: BatchNorm needs the variance of a few")


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

    def demand_rows(self, uids: list[str]) -> None:
        """Raises BadInput: a single image of a batch is left, in training and where no other process has more."""
        if self.norm.training and self.norm.share is None and len(uids) < 2:
            problem = "no other image of its batch decodes, and BatchNorm needs the variance of a few"
            raise BadInput(", ".join(uids), problem, "Verify the download, or take more images a batch")

    def forward(self, x: Float[Tensor, "*batch inside"]) -> Float[Tensor, "*batch outside"]:
        """Projected vectors."""
        hidden = self.hidden(x)
        hidden = self.norm(hidden.flatten(0, -2)).view_as(hidden)
        return self.out(self.activation(hidden))
