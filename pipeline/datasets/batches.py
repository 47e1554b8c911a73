"""From stored pairs to training batches: `PairTransform` in the loader's threads, `PairCollate` over its results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from numpy import ndarray
from torch import Tensor

from pipeline.datasets.pairs import PairShard, Sample, captions
from pipeline.datasets.transforms import move_labels, normalise, random_view, render
from pipeline.interfaces import TrainBatch
from pipeline.nn.text import Vocabulary
from pipeline.params import Range
from pipeline.text.tokenizers import BytePairTokenizer

CaptionForm = Literal["caption", "nouns"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Augmentation:
    """Random-resized crop and flip; a block of params.yaml.

    Attributes:
        image_size: side of the training input, pixels.
        crop_scale: smallest and largest share of the image's area.
        crop_ratio: smallest and largest width / height.
        flip_chance: chance of mirroring.
        caption_form: the caption as it is, or only its nouns.
    """

    image_size: Annotated[int, Range(1)]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip_chance: Annotated[float, Range(0, 1)]
    caption_form: CaptionForm


@dataclass(frozen=True, slots=True)
class Prepared:
    """One sample's view, before it is stacked."""

    pixels: UInt8[ndarray, "side side 3"]
    caption: str
    regions: UInt8[ndarray, "grid_h grid_w"] | None


@dataclass(frozen=True, slots=True)
class PairTransform:
    """One random view of pixels and pseudo-masks, and one of the captions. `grid`: side of the moved label grid."""

    augmentation: Augmentation
    grid: int

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Prepared:
        settings = self.augmentation
        view = random_view(
            rng,
            height=sample.image.shape[0],
            width=sample.image.shape[1],
            scale=settings.crop_scale,
            ratio=settings.crop_ratio,
            flip_chance=settings.flip_chance,
        )
        regions = None if sample.regions is None else move_labels(sample.regions, view, (self.grid, self.grid))
        caption = sample.caption(rng)
        if settings.caption_form == "nouns" and sample.nouns:
            caption = " ".join(sample.nouns)
        return Prepared(render(sample.image, view, settings.image_size), caption, regions)


@dataclass(frozen=True, slots=True)
class PairCollate:
    """Stack, normalise and tokenise."""

    tokenizer: Callable[[list[str]], Int64[Tensor, "batch length"]]

    def __call__(self, prepared: list[Prepared], uids: list[str]) -> TrainBatch:
        # numpy, not torch: torch would start a set of threads of its own in each of the loader's threads.
        pixels = normalise(np.stack([item.pixels for item in prepared]))
        captions = [item.caption for item in prepared]
        regions = [item.regions for item in prepared if item.regions is not None]
        return TrainBatch(
            # A view with the channels last in memory, which convolutions on a CPU prefer.
            pixels=torch.from_numpy(pixels).permute(0, 3, 1, 2),
            captions=captions,
            token_ids=self.tokenizer(captions),
            regions=torch.from_numpy(np.stack(regions)) if regions else None,
            uids=uids,
        )


def seen_tokens(shards: Sequence[PairShard], tokenizer: BytePairTokenizer) -> Vocabulary:
    """The vocabulary of the training captions, read a shard at a time."""
    ids = torch.cat([torch.unique(tokenizer(captions(shard))) for shard in shards])
    return Vocabulary.of(ids, vocab_size=tokenizer.vocab_size)
