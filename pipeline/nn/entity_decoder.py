"""OVSegmentor's decoder: the masked caption reads from the groups what stands behind its masks.

Axes: batch, length (text tokens), groups, dim.
"""

from jaxtyping import Float
from torch import Tensor, nn

from pipeline.nn.attention import Block, initialise
from pipeline.nn.grouping import NORM_EPS, PreAssign


class EntityDecoder(nn.Module):
    """Cross-attention of text over groups, then a self-attention block over the text; one layer.

    There is no padding mask: [CLS] attends to the states of the padding, as in the release. The release builds a second
    assignment attention in here and never calls it; those weights are not built, and an importer leaves them out.
    Source: OVSegmentor Eq. 8; card section 1.1.
    """

    def __init__(self, *, image_dim: int, text_dim: int, heads: int) -> None:
        super().__init__()
        self.dim = min(image_dim, text_dim)
        self.map_groups = nn.Linear(image_dim, self.dim) if image_dim > self.dim else nn.Identity()
        self.map_text = nn.Linear(text_dim, self.dim) if text_dim > self.dim else nn.Identity()
        self.norm_tokens, self.norm_x, self.norm_new_x = (nn.LayerNorm(self.dim, eps=NORM_EPS) for _ in range(3))
        self.pre_assign = PreAssign(self.dim, heads)
        self.block = Block(self.dim, heads, 4.0, eps=NORM_EPS)
        initialise(self)

    def forward(
        self, text: Float[Tensor, "batch length text_dim"], groups: Float[Tensor, "batch groups image_dim"]
    ) -> Float[Tensor, "batch length dim"]:
        """The completed caption's states."""
        attended = self.pre_assign(self.norm_tokens(self.map_text(text)), self.norm_x(self.map_groups(groups)))
        return self.norm_new_x(self.block(attended) + attended)
