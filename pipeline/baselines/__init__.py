"""Baselines beside the methods. The folder is the registry: a module is a baseline.

A baseline module has `digests(project)`, what its answers depend on beside code (weights, parameters), and
`build(project)`, which returns one of two things: a `pipeline.inference.ScoreModel`, scored like a trained method, or a
`LabelModel`, which gives label maps itself.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int64, UInt8
from torch import Tensor

from pipeline.datasets.benchmarks import Sample
from pipeline.params import ParamsError


@runtime_checkable
class LabelModel(Protocol):
    """Something that answers with label ids. `image_regions` (hard masks of an image) is optional."""

    def label(self, sample: Sample, num_classes: int, ignore_index: int) -> Int64[Tensor, "height width"]: ...


@runtime_checkable
class RegionModel(Protocol):
    """Something that divides an image into regions, at the image's size."""

    def image_regions(self, image: UInt8[np.ndarray, "height width 3"]) -> Int64[Tensor, "height width"]: ...


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
