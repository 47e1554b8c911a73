"""A method's training as phases: fits of one model after another, each with its own budget, batches and optimiser."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.training import Optimisation, Progress


def nothing() -> None:
    """What begins a phase that needs no preparation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """One call of `fit`.

    Attributes:
        name: after the method's in progress lines and checkpoints; empty for a method's only phase.
        optimisation: budget and AdamW.
        prepare: draws a sample's part of a batch (`datasets.preparing.Prepare`).
        collate: makes the batch of many (`datasets.preparing.Collate`).
        loss: see `fit`; every phase of a method returns the same terms.
        begin: called before the optimiser is built, on the weights the phase before left: freezes parameters, copies
            an average.
        after_step: see `fit`.
        traceable: whether the loss does nothing but compute, so that it can be compiled as a whole: no matching on the
            host, no shape that a tensor's values decide.
    """

    optimisation: Optimisation
    prepare: Callable[..., Any]
    collate: Callable[..., Any]
    loss: Callable[[Any, Progress], dict[str, Tensor]]
    name: str = ""
    begin: Callable[[], None] = nothing
    after_step: Callable[[Progress], None] | None = None
    traceable: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingData:
    """What a method may read.

    Attributes:
        shards: payload folders of the pairs and of the targets that the method asked for.
        index: payload of the entity -> rows index, or None where the method did not ask for it.
        codebook: payload of the data set's clusters, or None where the method did not ask for it.
    """

    shards: list[Any]
    index: Path | None
    codebook: Path | None = None
