"""Training of the small CLIP: captions and noun prompts against images, with a learnable temperature.

Source: CLIP 2.3 (loss, temperature), LiT (frozen image tower), GroupViT 3.3 (noun prompts).
Deviates: equal texts of a batch are one another's positives, because short prompts repeat.

Axes: batch, prompts (per image), length (text tokens), dim.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.datasets.batches import TemplateSet
from pipeline.datasets.pairs import Shuffle
from pipeline.datasets.transforms import ViewConfig
from pipeline.encoders.small_clip import ClipArchitecture, SmallClip
from pipeline.interfaces import TrainBatch
from pipeline.losses.contrastive import ContrastiveLoss, same_text
from pipeline.params import Range
from pipeline.training import Optimisation, Progress

Positive = Annotated[float, Range(0, low_open=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipConfig:
    """Block `encoders.clip.train`.

    Attributes:
        architecture: both towers.
        num_prompts: noun prompts per image and step, beside its caption.
        templates: the set they are filled into.
        temperature: initial.
        max_scale: cap of the inverse temperature.
        views: crops of the images.
        shuffle: order of the pairs.
        optimisation: budget and AdamW.
    """

    architecture: ClipArchitecture
    num_prompts: Annotated[int, Range(0)]
    templates: TemplateSet
    temperature: Positive
    max_scale: Positive
    views: ViewConfig
    shuffle: Shuffle
    optimisation: Optimisation


class ClipTraining(nn.Module):
    """The towers with their temperature: everything a checkpoint needs."""

    def __init__(self, clip: SmallClip, config: ClipConfig) -> None:
        super().__init__()
        self.clip = clip
        self.contrast = ContrastiveLoss(temperature=config.temperature, max_scale=config.max_scale)

    def loss(self, batch: TrainBatch, _progress: Progress) -> dict[str, Tensor]:
        """`captions`, `prompts` (sums of both directions, the latter a mean over prompts) and `total`, in nats."""
        image = self.clip.encode_image(batch.pixels)
        captions = self._contrast(image, batch.token_ids)
        if batch.prompt_ids is None:
            return {"captions": captions, "total": captions}
        prompts = torch.stack([self._contrast(image, ids) for ids in batch.prompt_ids]).mean()
        return {"captions": captions, "prompts": prompts, "total": captions + prompts}

    def _contrast(
        self, image: Float[Tensor, "batch dim"], token_ids: Int64[Tensor, "batch length"]
    ) -> Float[Tensor, ""]:
        terms = self.contrast(image, self.clip.embed_ids(token_ids), same_text(token_ids))
        return terms.image_to_text + terms.text_to_image

    @torch.no_grad()
    def finished(self) -> SmallClip:
        """The towers, with the temperature they were trained to."""
        self.clip.scale.copy_(self.contrast.scale)
        return self.clip
