"""Training batches for a method that names regions: pictures, their cluster maps, and the nouns of their captions.

Axes: batch, side (pixels), rows x columns (cells of the cluster map), nouns (of all captions, one after the other).
"""

from dataclasses import dataclass
from random import Random

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from numpy import ndarray
from torch import Tensor

from pipeline.datasets.looks import Drawn
from pipeline.datasets.pairs import Sample
from pipeline.datasets.pixels import Packed, Pixels
from pipeline.datasets.transforms import ViewConfig, move_labels
from pipeline.interfaces import on_device


@dataclass(frozen=True, slots=True)
class Named:
    """A sample's clusters, moved with its view, and its nouns."""

    groups: UInt8[ndarray, "rows columns"]
    nouns: tuple[str, ...]


@dataclass
class RegionBatch:
    """pixels: ImageNet-normalised. groups: OUTSIDE where the crop leaves the image. owner: the picture of each noun."""

    pixels: Float[Tensor, "batch 3 side side"]
    groups: Int64[Tensor, "batch rows columns"]
    nouns: list[str]
    owner: Int64[Tensor, " nouns"]
    uids: list[str]

    def to(self, device: torch.device | str) -> "RegionBatch":
        """The same batch on `device`."""
        return on_device(self, device)


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionTransform:
    """A view of the picture and its clusters, and at most `max_nouns` of its nouns, each once, in the captions' order.

    Source: card scg.md section 5 (nouns without repetition, without words such as "photo": `stop_nouns`).
    """

    views: ViewConfig
    grid: int
    max_nouns: int
    stop_nouns: frozenset[str]

    def __call__(self, sample: Sample, rng: Random) -> Drawn:
        if sample.groups is None:
            raise ValueError(f"{sample.uid} has no cluster map")
        view = self.views.draw(sample.image, rng)
        found = [noun for noun in dict.fromkeys(sample.nouns) if noun not in self.stop_nouns]
        if len(found) > self.max_nouns:
            found = [found[i] for i in sorted(rng.sample(range(len(found)), self.max_nouns))]
        groups = move_labels(sample.groups, view, (self.grid, self.grid))
        return Drawn(Named(groups, tuple(found)), {"pixels": self.views.look(sample.image, view, rng)})


def collate(samples: list[Named], uids: list[str], shown: dict[str, Pixels]) -> Packed[RegionBatch]:
    """Stack. Samples without a noun stay as pictures that no noun belongs to."""
    counts = torch.tensor([len(sample.nouns) for sample in samples])
    others = {
        "groups": torch.from_numpy(np.stack([sample.groups for sample in samples])).long(),
        "nouns": [noun for sample in samples for noun in sample.nouns],
        "owner": torch.arange(len(samples)).repeat_interleave(counts),
        "uids": uids,
    }
    return Packed(RegionBatch, shown, others)
