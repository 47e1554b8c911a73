"""From stored pairs to training batches: `PairTransform` draws a row's part, `PairCollate` makes a batch of many."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from numpy import ndarray
from torch import Tensor

from pipeline.datasets.augmentation import Change, changed, draw_erased, draw_operations
from pipeline.datasets.images import StoredImage
from pipeline.datasets.looks import Drawn, Look
from pipeline.datasets.pairs import PairShard, Sample, captions
from pipeline.datasets.pixels import Packed, Pixels
from pipeline.datasets.text_rows import in_rows
from pipeline.datasets.transforms import View, ViewConfig, move_labels
from pipeline.interfaces import TrainBatch
from pipeline.nn.text import TextConfig, Vocabulary
from pipeline.params import Range
from pipeline.text import prompts
from pipeline.text.tokenizers import BytePairTokenizer
from pipeline.text.verdicts import kept

CaptionForm = Literal["caption", "nouns"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StrongViews(ViewConfig):
    """Views whose pixels change as well; a block of params.yaml. For methods without pseudo-masks.

    Attributes:
        rand_augment: operations of timm's policy rand-m9-mstd0.5-inc1; 0 for none.
        erase_chance: of a rectangle of noise.
    """

    rand_augment: Annotated[int, Range(0)]
    erase_chance: Annotated[float, Range(0, 1)]

    def look(self, image: StoredImage, view: View, rng: Random) -> Look:
        """The view, changed and with a rectangle erased by their chances."""
        operations = draw_operations(self.rand_augment, rng)
        erased = draw_erased(self.image_size, self.erase_chance, rng)
        return Look(image, self.image_size, partial(_paint, view, operations) if operations else view.paint, erased)


def _paint(
    view: View,
    operations: Sequence[Change],
    image: UInt8[ndarray, "height width 3"],
    out: UInt8[ndarray, "side side 3"],
) -> UInt8[ndarray, "side side 3"]:
    np.copyto(out, changed(view.paint(image, np.empty_like(out)), operations))
    return out


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation(ViewConfig):
    """Views of images and captions; a block of params.yaml.

    Attributes:
        caption_form: the caption as it is, or only its nouns.
    """

    caption_form: CaptionForm


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sample's part of a batch, less its pixels."""

    caption: str
    regions: UInt8[ndarray, "grid_h grid_w"] | None
    prompts: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class PairTransform:
    """One random view of pixels and pseudo-masks, one of the captions, and prompts made of its nouns.

    `grid`: side of the moved label grid. Pseudo-masks are for plain views: `StrongViews` move pixels away from them.
    `num_prompts` nouns are filled into drawn `templates` (GroupViT 3.2).
    """

    views: ViewConfig
    grid: int = 1
    caption_form: CaptionForm = "caption"
    num_prompts: int = 0
    templates: tuple[str, ...] = ()

    def __call__(self, sample: Sample, rng: Random) -> Drawn:
        view = self.views.draw(sample.image, rng)
        look = self.views.look(sample.image, view, rng)
        regions = None if sample.regions is None else move_labels(sample.regions, view, (self.grid, self.grid))
        caption = sample.caption(rng)
        words = prompts.noun_prompts(caption, sample.nouns, self.num_prompts, self.templates, rng)
        if self.caption_form == "nouns" and sample.nouns:
            caption = " ".join(sample.nouns)
        return Drawn(Prepared(caption, regions, words), {"pixels": look})


@dataclass(frozen=True, slots=True)
class PairCollate:
    """Stack pseudo-masks and tokenise; texts side by side as well where the tower takes `rows` of them.

    Raises:
        ValueError: of a batch's images some have pseudo-masks, and some none.
    """

    tokenizer: BytePairTokenizer
    rows: bool = False

    def __call__(self, prepared: list[Prepared], uids: list[str], shown: dict[str, Pixels]) -> Packed[TrainBatch]:
        captions = [item.caption for item in prepared]
        ids = [self.tokenizer(captions)]
        ids += [self.tokenizer(list(texts)) for texts in zip(*(item.prompts for item in prepared), strict=True)]
        others = {
            "captions": captions,
            "token_ids": ids[0],
            "regions": _stacked([item.regions for item in prepared]),
            "uids": uids,
            "prompt_ids": torch.stack(ids[1:]) if ids[1:] else None,
            "rows": in_rows(torch.cat(ids), self.tokenizer.eot) if self.rows else None,
        }
        return Packed(TrainBatch, shown, others)


def _stacked(
    regions: Sequence[UInt8[ndarray, "grid_h grid_w"] | None],
) -> UInt8[Tensor, "batch grid_h grid_w"] | None:
    there = [labels for labels in regions if labels is not None]
    if there and len(there) < len(regions):
        raise ValueError(f"{len(regions) - len(there)} of {len(regions)} images of a batch have no pseudo-masks")
    return torch.from_numpy(np.stack(there)) if there else None


def seen_tokens(
    shards: Sequence[PairShard], tokenizer: BytePairTokenizer, *, templates: Sequence[str] = ()
) -> Vocabulary:
    """The vocabulary of the training captions, read a shard at a time; with that of noun prompts where templates are.

    Nouns are singulars, so they are other words than the captions'.
    """
    ids = [tokenizer([prompts.fill(template, "") for template in templates]).flatten()] if templates else []
    for shard in shards:
        ids.append(torch.unique(tokenizer(captions(shard))))
        if templates:
            nouns = {noun for row in kept(shard.filtered, "nouns")["nouns"].to_pylist() for noun in row}
            ids.append(torch.unique(tokenizer(sorted(nouns) or [""])))
    return Vocabulary.of(torch.cat(ids), vocab_size=tokenizer.vocab_size)


def seen_vocabulary(
    text: TextConfig, shards: Sequence[PairShard], *, templates: Sequence[str] = ()
) -> Vocabulary | None:
    """That of `seen_tokens` where the config asks for it; None for the full table."""
    if text.vocabulary == "full":
        return None
    return seen_tokens(shards, BytePairTokenizer(text.context_length), templates=templates)
