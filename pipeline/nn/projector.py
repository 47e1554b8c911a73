"""The projection heads of GroupViT, OVSegmentor and ZeroSeg."""

from jaxtyping import Float
from torch import Tensor, nn

HIDDEN = 4096  # Source: GroupViT's release


class Projector(nn.Module):
    """Linear, BatchNorm, ReLU, Linear, applied to every vector; the output is not normalised.

    The release writes the linear layers as 1x1 convolutions. BatchNorm normalises over all leading axes together; its
    running statistics are used in eval mode.
    Source: GroupViT (card section 4).
    """

    def __init__(self, inside: int, outside: int, *, hidden: int = HIDDEN) -> None:
        super().__init__()
        self.hidden = nn.Linear(inside, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.activation = nn.ReLU()
        self.out = nn.Linear(hidden, outside)

    def forward(self, x: Float[Tensor, "*batch inside"]) -> Float[Tensor, "*batch outside"]:
        """Projected vectors."""
        hidden = self.hidden(x)
        hidden = self.norm(hidden.flatten(0, -2)).view_as(hidden)
        return self.out(self.activation(hidden))
