"""Training of the small CLIP: captions and noun prompts against images, with a learnable temperature.

Source: CLIP 2.3 (loss, temperature), LiT (frozen image tower), GroupViT 3.2 (noun prompts).
Deviates: equal texts of a batch are one another's positives, because short prompts repeat.

Axes: batch, prompts (per image), length (text tokens), dim.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.datasets.pairs import Shuffle
from pipeline.datasets.transforms import ViewConfig
from pipeline.encoders.small_clip import ClipArchitecture, SmallClip
from pipeline.interfaces import TrainBatch
from pipeline.losses.contrastive import ContrastiveLoss
from pipeline.params import Range
from pipeline.text.prompts import TemplateSet
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
        second_reading_from: share of the budget after which the second of two readings (pooling "both") is learned too.
        views: crops of the images.
        shuffle: order of the pairs.
        optimisation: budget and AdamW.
    """

    architecture: ClipArchitecture
    num_prompts: Annotated[int, Range(0)]
    templates: TemplateSet
    temperature: Positive
    max_scale: Positive
    second_reading_from: Annotated[float, Range(0, 1)]
    views: ViewConfig
    shuffle: Shuffle
    optimisation: Optimisation


class ClipTraining(nn.Module):
    """The towers with their temperature: everything a checkpoint needs."""

    def __init__(self, clip: SmallClip, config: ClipConfig) -> None:
        super().__init__()
        self.clip = clip
        self.contrast = ContrastiveLoss(temperature=config.temperature, max_scale=config.max_scale)
        self.second_from = config.second_reading_from

    def loss(self, batch: TrainBatch, progress: Progress) -> dict[str, Tensor]:
        """`captions`, `prompts` (sums of both directions, the latter a mean over prompts) and `total`, in nats.

        A CLIP that reads images in two ways has one of each for either, and `total` is their sum; the second reading
        counts from `second_reading_from` on, since both from the start learn names later (reports/log.md).
        """
        readings = self.clip.readings(batch.pixels)
        captions, *prompts = self._texts(batch)
        terms: dict[str, Tensor] = {}
        total = torch.zeros((), device=batch.pixels.device)
        for number, (name, image) in enumerate(readings.items()):
            found = {"captions": self._contrast(image, *captions)}
            if prompts:
                found["prompts"] = torch.stack([self._contrast(image, *texts) for texts in prompts]).mean()
            counts = not number or progress.fraction >= self.second_from
            total = total + float(counts) * torch.stack(list(found.values())).sum()
            terms |= {f"{name}_{key}" if number else key: value for key, value in found.items()}
        return {**terms, "total": total}

    def _texts(self, batch: TrainBatch) -> list[tuple[Float[Tensor, "batch dim"], Int64[Tensor, "batch length"]]]:
        """Of the captions and of every prompt: unit vectors, and the tokens, which say what texts are equal."""
        ids = [batch.token_ids, *(() if batch.prompt_ids is None else batch.prompt_ids)]
        if batch.rows is None:
            return [(self.clip.embed_ids(texts), texts) for texts in ids]
        return list(zip(self.clip.embed_ids(batch.rows).unflatten(0, (len(ids), -1)), ids, strict=True))

    def _contrast(
        self,
        image: Float[Tensor, "batch dim"],
        texts: Float[Tensor, "batch dim"],
        token_ids: Int64[Tensor, "batch length"],
    ) -> Float[Tensor, ""]:
        return self.contrast(image, texts, token_ids).loss(halved=False)

    @torch.no_grad()
    def finished(self) -> SmallClip:
        """The towers, with the temperature they were trained to."""
        self.clip.scale.copy_(self.contrast.scale)
        return self.clip
