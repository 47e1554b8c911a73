"""Baselines beside the methods. The folder is the registry: a module is a baseline.

A baseline module has `digests(project)`, what its answers depend on beside code (weights, parameters), and
`build(project)`, which returns one of two things: a `pipeline.inference.ScoreModel`, scored like a trained method, or a
`LabelModel`, which gives label maps itself. One with parameters has a `Config` too, for block `baselines.<name>`.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from pipeline import encoders
from pipeline.artifacts.files import digest
from pipeline.artifacts.weights import model_digest
from pipeline.datasets.benchmarks import Sample
from pipeline.interfaces import ClipEncoder
from pipeline.metrics import oracle_labels
from pipeline.nn.reading import Memory
from pipeline.nn.region_clip import ImageRegions
from pipeline.params import ParamsError, plain
from pipeline.project import Project


@runtime_checkable
class LabelModel(Protocol):
    """Something that answers with label ids. `image_regions` (hard masks of an image) is optional."""

    def label(self, sample: Sample, num_classes: int, ignore_index: int) -> Int64[Tensor, "height width"]: ...


@runtime_checkable
class ClosedVocabulary(LabelModel, Protocol):
    """A `LabelModel` that learned one class list and answers no other; `described` is what its report says of that."""

    classes: tuple[str, ...]

    def answer(self, image: UInt8[np.ndarray, "height width 3"]) -> Int64[Tensor, "height width"]: ...

    def described(self) -> dict[str, Any]: ...


@runtime_checkable
class RegionModel(Protocol):
    """Something that divides an image into regions, at the image's size."""

    def image_regions(self, image: UInt8[np.ndarray, "height width 3"]) -> Int64[Tensor, "height width"]: ...


class RegionOracle:
    """A `LabelModel` that reads the truth, and a `RegionModel` that does not: regions of any source, computed once."""

    def __init__(self, image_regions: ImageRegions) -> None:
        self.image_regions_of, self.memory = image_regions, Memory()

    def image_regions(self, image: UInt8[np.ndarray, "height width 3"]) -> Int64[Tensor, "height width"]:
        """The source's regions."""
        return self.memory.recall(torch.tensor(image), lambda: (self.image_regions_of(image),))[0]

    def label(self, sample: Sample, num_classes: int, ignore_index: int) -> Int64[Tensor, "height width"]:
        """Every region in the class of most of its pixels."""
        truth = torch.tensor(sample.label)
        return oracle_labels(self.image_regions(sample.image), truth, num_classes, "majority", ignore_index)


def clip_digests(project: Project, block: str, config: type) -> dict[str, str]:
    """What a baseline depends on that has the project's CLIP and the parameters of its block."""
    settings = digest(plain(project.config(block, config)))
    return {"clip": model_digest(project.encoder("clip")), "settings": settings}


def pixel_digests(project: Project, block: str, config: type) -> dict[str, str]:
    """What a baseline depends on that clusters pixels: no weights, its block and the number of the pseudo-masks."""
    return {"settings": digest([plain(project.config(block, config)), num_regions(project)])}


def num_regions(project: Project) -> int:
    """Regions of an image's pseudo-mask."""
    from pipeline.caching import pseudo_masks  # here: it imports numba, and every command imports this package

    return project.config("pseudo_masks", pseudo_masks.Config).k


def project_clip(project: Project) -> ClipEncoder:
    """The project's CLIP encoder, on its device."""
    return encoders.load_clip(project.encoder("clip")).to(project.machine.device)


def names() -> list[str]:
    """Every module of this folder."""
    return sorted(module.name for module in iter_modules(__path__))


def get(name: str) -> ModuleType:
    """The baseline's module.

    Raises:
        ParamsError: no such baseline.
    """
    if name not in names():
        raise ParamsError(f"unknown baseline {name!r}: choose from {', '.join(names())}")
    return import_module(f"{__name__}.{name}")
