"""Training batches of the small CLIP: an image's view, its caption, and prompts made of the caption's nouns.

Axes: batch, prompts (per image), length (text tokens), side (pixels).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray
from torch import Tensor

from pipeline.datasets.pairs import Sample
from pipeline.datasets.transforms import normalise, random_view, render
from pipeline.params import Range
from pipeline.text import prompts

Templates = Literal["single", "subset", "imagenet", "tcl"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ViewConfig:
    """Random-resized crop and flip.

    Attributes:
        image_size: side of the training input, pixels.
        crop_scale: smallest and largest share of the image's area.
        crop_ratio: smallest and largest width / height.
        flip_chance: chance of mirroring.
    """

    image_size: Annotated[int, Range(1)]
    crop_scale: tuple[float, float]
    crop_ratio: tuple[float, float]
    flip_chance: Annotated[float, Range(0, 1)]


@dataclass(frozen=True, slots=True)
class Prompted:
    """One sample, before it is stacked."""

    pixels: UInt8[ndarray, "side side 3"]
    caption: str
    prompts: list[str]


@dataclass(frozen=True, slots=True)
class PromptedBatch:
    """ImageNet-normalised pixels, and token ids padded with 0; `prompts[k, i]` is the k-th prompt of image i."""

    pixels: Float[Tensor, "batch 3 side side"]
    captions: Int64[Tensor, "batch length"]
    prompts: Int64[Tensor, "prompts batch length"]
    uids: list[str]

    def to(self, device: torch.device | str) -> "PromptedBatch":
        """The same batch on `device`."""
        pixels, captions, prompt_ids = (
            x.to(device, non_blocking=True) for x in (self.pixels, self.captions, self.prompts)
        )
        return PromptedBatch(pixels, captions, prompt_ids, self.uids)


@dataclass(frozen=True, slots=True)
class PromptedTransform:
    """One random view, one of the captions, and `num_prompts` of its nouns in `templates`."""

    views: ViewConfig
    num_prompts: int
    templates: tuple[str, ...]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Prompted:
        settings = self.views
        view = random_view(
            rng,
            height=sample.image.shape[0],
            width=sample.image.shape[1],
            scale=settings.crop_scale,
            ratio=settings.crop_ratio,
            flip_chance=settings.flip_chance,
        )
        caption = sample.caption(rng)
        words = prompts.noun_prompts(caption, sample.nouns, self.num_prompts, self.templates, rng)
        return Prompted(render(sample.image, view, settings.image_size), caption, words)


@dataclass(frozen=True, slots=True)
class PromptedCollate:
    """Stack, normalise and tokenise; numpy for pixels, because torch would start threads in each loader thread."""

    tokenizer: Callable[[list[str]], Int64[Tensor, "batch length"]]

    def __call__(self, samples: list[Prompted], uids: list[str]) -> PromptedBatch:
        pixels = normalise(np.stack([item.pixels for item in samples]))
        captions = self.tokenizer([item.caption for item in samples])
        rows = [self.tokenizer(list(texts)) for texts in zip(*(item.prompts for item in samples), strict=True)]
        return PromptedBatch(
            # A view with the channels last in memory, which convolutions on a CPU prefer.
            torch.from_numpy(pixels).permute(0, 3, 1, 2),
            captions,
            torch.stack(rows) if rows else captions.new_zeros(0, *captions.shape),
            uids,
        )
