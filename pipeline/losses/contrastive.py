"""Symmetric image-text InfoNCE with a learnable temperature: each image against captions, or against noun prompts.

Axes: rows (pairs of this process), all (pairs of every process), prompts (of an image), dim. Embeddings are unit
vectors.
"""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.losses.parts import over_parts

# Turns the rows of this process into the rows of every process, with the position of the first own row among them.
Gather = Callable[[Tensor], tuple[Tensor, int]]
# How the inverse temperature stays below its cap: see `Temperature`.
Cap = Literal["parameter", "forward"]
MultiLabelForm = Literal["released", "print"]


class ContrastiveTerms(NamedTuple):
    """The two directions, each a mean over rows in nats.

    Their sum is the printed loss of S-Seg and GroupViT; half of it that of CLIP's and GroupViT's releases.
    """

    image_to_text: Float[Tensor, ""]
    text_to_image: Float[Tensor, ""]

    def loss(self, *, halved: bool) -> Float[Tensor, ""]:
        """Sum of the directions, or half of it."""
        total = self.image_to_text + self.text_to_image
        return total / 2 if halved else total


def own_rows(rows: Tensor) -> tuple[Tensor, int]:
    """The gather of a single process."""
    return rows, 0


def same_text(token_ids: Int64[Tensor, "rows length"], among: Int64[Tensor, "all length"]) -> Float[Tensor, "rows all"]:
    """Targets that treat rows with the same text as one another's positives; every row sums to 1.

    With short prompts ("a photo of a dog") a batch holds many equal texts; plain InfoNCE would push their images apart.
    """
    equal = (token_ids[:, None] == among[None]).all(dim=-1).float()
    return equal / equal.sum(dim=1, keepdim=True)


@over_parts
def info_nce(
    image: Float[Tensor, "rows dim"],
    text: Float[Tensor, "rows dim"],
    scale: Float[Tensor, ""],
    token_ids: Int64[Tensor, "rows length"] | None = None,
    *,
    gather: Gather = own_rows,
) -> ContrastiveTerms:
    """Cross-entropy of each image among the texts and of each text among the images.

    `scale` multiplies cosines. With `token_ids` equal texts are right as well, in both directions. The arithmetic is
    fp32 whatever the autocast state. Source: S-Seg Eq. 2, 3 and the sum below them.
    Deviates: CLIP (Fig. 3) halves that sum.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, text = image.float(), text.float()
        all_images, first = gather(image)
        all_texts, _ = gather(text)
        image_logits = scale * image @ all_texts.T
        text_logits = scale * text @ all_images.T
        if token_ids is None:
            right = torch.arange(len(image), device=image.device) + first
        else:
            right = same_text(token_ids, gather(token_ids)[0])
        return ContrastiveTerms(F.cross_entropy(image_logits, right), F.cross_entropy(text_logits, right))


@over_parts
def multi_label(
    image: Float[Tensor, "rows dim"],
    prompts: Float[Tensor, "rows prompts dim"],
    scale: Float[Tensor, ""],
    *,
    form: MultiLabelForm,
    gather: Gather = own_rows,
) -> ContrastiveTerms:
    """InfoNCE where each image has several texts.

    Each image among the prompts of all images, its own being the positives; each prompt among all images. fp32.
    "released": mean of the positives' log-probabilities, which wants every prompt to be likely. "print": logarithm of
    their summed probability, which one likely prompt satisfies; it is smaller by at least log(prompts).
    Source: GroupViT's release ("released"), Eq. 7 ("print"); card groupvit.md sections 5 and 12.
    """
    with torch.autocast(image.device.type, enabled=False):
        image, flat = image.float(), prompts.float().flatten(0, 1)
        rows, count = prompts.shape[:2]
        all_images, first = gather(image)
        all_prompts, first_prompt = gather(flat)
        logits = scale * image @ all_prompts.T
        own = first_prompt + torch.arange(rows * count, device=image.device).view(rows, count)
        positives = logits.gather(1, own)
        positive = positives.mean(dim=1) if form == "released" else positives.logsumexp(dim=1)
        labels = torch.arange(rows, device=image.device).repeat_interleave(count) + first
        text_to_image = F.cross_entropy(scale * flat @ all_images.T, labels)
        return ContrastiveTerms((logits.logsumexp(dim=1) - positive).mean(), text_to_image)


class Temperature(nn.Module):
    """The inverse temperature, learned as its logarithm and capped.

    `cap` "parameter": the logarithm is set back in place before use, so that it keeps a gradient and can fall again;
    CLIP's release. "forward": the parameter may rise above the cap, where it has no gradient; GroupViT's release.
    Source: CLIP 2.5 (initial temperature 0.07, scale clipped at 100); card groupvit.md section 5.
    """

    def __init__(self, *, temperature: float, max_scale: float, cap: Cap = "parameter") -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / temperature)))
        self.max_scale, self.cap = max_scale, cap

    @property
    def scale(self) -> Float[Tensor, ""]:
        """What cosines are multiplied with: 1 / temperature."""
        scale = self.log_scale.exp()
        return scale.clamp(max=self.max_scale) if self.cap == "forward" else scale

    def capped(self) -> Float[Tensor, ""]:
        """The scale for a training step, the parameter set back where `cap` says so."""
        if self.cap == "parameter":
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(self.max_scale))
        return self.scale


class ContrastiveLoss(Temperature):
    """InfoNCE with its own temperature."""

    def __init__(
        self, *, temperature: float, max_scale: float, cap: Cap = "parameter", gather: Gather = own_rows
    ) -> None:
        super().__init__(temperature=temperature, max_scale=max_scale, cap=cap)
        self.gather = gather

    def forward(
        self,
        image: Float[Tensor, "rows dim"],
        text: Float[Tensor, "rows dim"],
        token_ids: Int64[Tensor, "rows length"] | None = None,
    ) -> ContrastiveTerms:
        """The two directions for unit vectors `image` and `text`; see `info_nce`."""
        return info_nce(image, text, self.capped(), token_ids, gather=self.gather)
