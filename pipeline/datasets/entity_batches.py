"""OVSegmentor's batches: an image with its caption in up to three forms, and a partner image that shares an entity.

`EntityTransform` runs in the loader's threads, `EntityCollate` over its results.
"""

from dataclasses import dataclass
from random import Random
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipeline.datasets.batches import StrongViews
from pipeline.datasets.images import StoredImage
from pipeline.datasets.joined import Sample
from pipeline.datasets.looks import Drawn, Look
from pipeline.datasets.partners import Partners
from pipeline.datasets.pixels import Packed, Pixels
from pipeline.interfaces import on_device
from pipeline.nn.text import inside_text
from pipeline.text.entities import Vocabulary
from pipeline.text.mask_tokens import MaskTokenizer, without_masks
from pipeline.text.masking import Masked, Strip, Target, mask_caption
from pipeline.text.prompts import entity_answer, noun_prompts

# What the text side learns beside the caption's contrast; Table 4 of OVSegmentor.
Completion = Literal["all", "one", "nouns", "multi_label", "mlm", "mlm_without_groups", "none"]
_TARGETS: dict[str, Target] = {"all": "all", "one": "one", "nouns": "nouns", "mlm": "all", "mlm_without_groups": "all"}


@dataclass
class EntityBatch:
    """Row i of every field is the same sample; what a setting does not need is None.

    pixels, partner_pixels: ImageNet-normalised. token_ids: the caption; masked_ids: with masks; answer_ids: the
    sentence that names what is behind them. mask_classes: the class behind each mask token, -1 elsewhere. prompt_ids:
    the k-th entity prompt of image i at [k, i]. entities: class of the entity that row and partner share. paired: False
    where there is no partner; the row's own image stands there, and class 0.
    """

    pixels: Float[Tensor, "batch 3 height width"]
    token_ids: Int64[Tensor, "batch length"]
    uids: list[str]
    masked_ids: Int64[Tensor, "batch masked"] | None = None
    answer_ids: Int64[Tensor, "batch answer"] | None = None
    mask_classes: Int64[Tensor, "batch masked"] | None = None
    prompt_ids: Int64[Tensor, "prompts batch prompt"] | None = None
    partner_pixels: Float[Tensor, "batch 3 height width"] | None = None
    entities: Int64[Tensor, " batch"] | None = None
    paired: Bool[Tensor, " batch"] | None = None

    def to(self, device: torch.device | str) -> "EntityBatch":
        """The same batch on `device`."""
        return on_device(self, device)


@dataclass(frozen=True, slots=True)
class PreparedEntities:
    """A sample's part of a batch, less its pixels. `partner`: class of the shared entity; `answer` is a sentence."""

    caption: str
    masked: Masked | None
    answer: str
    prompts: list[str]
    partner: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EntityTransform:
    """An image's view, a caption, its masked form with the answer, and where `partners` is given a partner's view.

    The answer is the text of a drawn template before its slot and the names joined by "and"; without a mask it is the
    template's beginning alone (card section 3.3). `num_prompts` prompts are for completion `multi_label`. A row's own
    view stands for that of a partner which it has not.
    """

    views: StrongViews
    vocabulary: Vocabulary
    completion: Completion
    strip: Strip
    templates: tuple[str, ...]
    num_prompts: int
    partners: Partners | None = None

    def __call__(self, sample: Sample, rng: Random) -> Drawn:
        looks = {"pixels": self._look(sample.image, rng)}
        caption = without_masks(sample.caption(rng))
        masked, answer, words = None, "", []
        if self.completion in _TARGETS:
            target = _TARGETS[self.completion]
            masked = mask_caption(caption, self.vocabulary, sample.entities, sample.nouns, target, self.strip, rng)
            answer = entity_answer(masked.answer, rng.choice(self.templates))
        elif self.completion == "multi_label":
            names = [self.vocabulary.classes[entity] for entity in sample.entities]
            words = noun_prompts(caption, names, self.num_prompts, self.templates, rng)
        partner = None
        if self.partners is not None:
            partner = self.partners.draw(sample, rng)
            looks["partner_pixels"] = self._look(partner.image, rng) if partner else looks["pixels"]
        return Drawn(PreparedEntities(caption, masked, answer, words, partner and partner.entity), looks)

    def _look(self, image: StoredImage, rng: Random) -> Look:
        return self.views.look(image, self.views.draw(image, rng), rng)


@dataclass(frozen=True, slots=True)
class EntityCollate:
    """Tokenise. `partners`: whether the transform draws partners.

    `longest` cuts every form to its longest text in the batch, as the authors' own runs did; the release pads to the
    context length, and its decoder has no padding mask.
    """

    tokenizer: MaskTokenizer
    completion: Completion
    partners: bool
    longest: bool

    def __call__(
        self, prepared: list[PreparedEntities], uids: list[str], shown: dict[str, Pixels]
    ) -> Packed[EntityBatch]:
        others: dict[str, Any] = {"token_ids": self._ids([item.caption for item in prepared]), "uids": uids}
        masked = [item.masked for item in prepared if item.masked is not None]
        if masked:
            others["masked_ids"] = self._ids([item.text for item in masked])
        if self.completion in ("all", "one", "nouns"):
            others["answer_ids"] = self._ids([item.answer for item in prepared])
        elif masked:
            others["mask_classes"] = _mask_classes(others["masked_ids"], masked, self.tokenizer.mask)
        if self.completion == "multi_label":
            count = len(prepared[0].prompts)
            flat = self._ids([item.prompts[number] for number in range(count) for item in prepared])
            others["prompt_ids"] = flat.unflatten(0, (count, len(prepared)))
        if self.partners:
            others["entities"] = torch.tensor([item.partner or 0 for item in prepared])
            others["paired"] = torch.tensor([item.partner is not None for item in prepared])
        return Packed(EntityBatch, shown, others)

    def _ids(self, texts: list[str]) -> Int64[Tensor, "batch length"]:
        ids = self.tokenizer(texts)
        return ids[:, : int(inside_text(ids, self.tokenizer.eot).sum(1).max())] if self.longest else ids


def _mask_classes(
    masked_ids: Int64[Tensor, "batch length"], masked: list[Masked], mask: int
) -> Int64[Tensor, "batch length"]:
    """Classes at the mask tokens; masks beyond the context length are lost."""
    classes = torch.full_like(masked_ids, -1)
    for row, item in enumerate(masked):
        positions = torch.nonzero(masked_ids[row] == mask)[:, 0]
        classes[row, positions] = torch.tensor(item.classes[: len(positions)], dtype=torch.int64)
    return classes
