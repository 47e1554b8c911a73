"""Symmetric image-text InfoNCE with a learnable temperature.

Axes: rows (pairs of this process), all (pairs of every process), dim. Embeddings are unit vectors.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

# Turns the rows of this process into the rows of every process, with the position of the first own row among them.
Gather = Callable[[Tensor], tuple[Tensor, int]]


class ContrastiveTerms(NamedTuple):
    """The two directions, each a mean over rows in nats; the loss is their sum (no half)."""

    image_to_text: Float[Tensor, ""]
    text_to_image: Float[Tensor, ""]


def own_rows(rows: Tensor) -> tuple[Tensor, int]:
    """The gather of a single process."""
    return rows, 0


def same_text(token_ids: Int64[Tensor, "rows length"]) -> Float[Tensor, "rows rows"]:
    """Targets that treat rows with the same text as one another's positives; every row sums to 1.

    With short prompts ("a photo of a dog") a batch holds many equal texts; plain InfoNCE would push their images apart.
    """
    equal = (token_ids[:, None] == token_ids[None]).all(dim=-1).float()
    return equal / equal.sum(dim=1, keepdim=True)


def info_nce(
    image: Float[Tensor, "rows dim"],
    text: Float[Tensor, "rows dim"],
    scale: Float[Tensor, ""],
    *,
    targets: Float[Tensor, "rows all"] | None = None,
    gather: Gather = own_rows,
) -> ContrastiveTerms:
    """Cross-entropy of each image among the texts and of each text among the images.

    `scale` multiplies cosines. `targets` (rows sum to 1) replaces the diagonal, in both directions. The arithmetic is
    fp32 whatever the autocast state. Source: S-Seg Eq. 1, 2 and the sum below them.
    Deviates: CLIP (Fig. 3) halves that sum.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = image.float(), text.float()
        all_images, first = gather(image)
        all_texts, _ = gather(text)
        image_logits = scale * image @ all_texts.T
        text_logits = scale * text @ all_images.T
        if targets is None:
            labels = torch.arange(len(image), device=image.device) + first
            return ContrastiveTerms(F.cross_entropy(image_logits, labels), F.cross_entropy(text_logits, labels))
        return ContrastiveTerms(F.cross_entropy(image_logits, targets), F.cross_entropy(text_logits, targets))


class ContrastiveLoss(nn.Module):
    """InfoNCE with its own temperature, learned as log(1 / temperature) and capped.

    Source: CLIP 2.5 (initial temperature 0.07, scale clipped at 100).
    """

    def __init__(self, *, temperature: float, max_scale: float, gather: Gather = own_rows) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.max_log_scale = math.log(max_scale)
        self.gather = gather

    @property
    def scale(self) -> Float[Tensor, ""]:
        """What cosines are multiplied with: 1 / temperature."""
        return self.log_scale.exp()

    def forward(
        self,
        image: Float[Tensor, "rows dim"],
        text: Float[Tensor, "rows dim"],
        targets: Float[Tensor, "rows all"] | None = None,
    ) -> ContrastiveTerms:
        """The two directions for unit vectors `image` and `text`."""
        with torch.no_grad():
            # In place, not in `scale`: a clamp in the graph has no gradient above the cap, so it could never come back.
            self.log_scale.clamp_(max=self.max_log_scale)
        return info_nce(image, text, self.scale, targets=targets, gather=self.gather)
