"""The block train.scg."""

from dataclasses import dataclass
from typing import Annotated, Literal

from pipeline.datasets.pairs import Shuffle
from pipeline.datasets.transforms import ViewConfig
from pipeline.losses import noun_region
from pipeline.nn.region_tokens import (
    ExtraKey,
)
from pipeline.params import ParamsError, Range
from pipeline.text.prompts import TemplateSet
from pipeline.training import Optimisation

Count = Annotated[int, Range(1)]


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupingConfig:
    """Where regions come from.

    Attributes:
        kind: "codebook" (clusters of the data set, a token each; card section 2, reading A) or "image_kmeans" (of each
            picture on its own, one token for all; reading B).
        clusters: of the codebook, which must have as many.
        image_clusters: of "image_kmeans".
        iters: of "image_kmeans".
        feature_dim: width of DINO's tokens.
    """

    kind: Literal["codebook", "image_kmeans"]
    clusters: Count
    image_clusters: Count
    iters: Count
    feature_dim: Count


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionConfig:
    """How CLIP reads a region.

    Attributes:
        strategy: "context" (the paper's c), "tokens" (b), "image" (a) or "average", the plain mean of a region's patch
            vectors, which is not the paper's. Only the first knows offsets.
        extra_key: see `nn.region_tokens`.
        width: of CLIP's image tower.
        offset_layers: 1 adds offsets at the input only; as many as CLIP has layers, before each of them.
        tune: "tokens" (the offsets), "all" (CLIP's image side beside them; Table 4) or "none".
    """

    strategy: Literal["context", "tokens", "image", "average"]
    extra_key: ExtraKey
    width: Count
    offset_layers: Count
    tune: Literal["tokens", "all", "none"]


@dataclass(frozen=True, kw_only=True, slots=True)
class NounConfig:
    """What is read of a caption.

    Attributes:
        max_nouns: of a caption; more are drawn from.
        stop_nouns: words that name no region.
        templates: sentences that a noun is put in; its vector is their normalised mean.
    """

    max_nouns: Count
    stop_nouns: tuple[str, ...]
    templates: TemplateSet


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Eq. 1 to 3 and Table 5; max_scale caps the inverse temperature, which starts at CLIP's."""

    direction: noun_region.Direction
    form: noun_region.Form
    max_scale: Annotated[float, Range(0, low_open=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The block train.scg."""

    grouping: GroupingConfig
    regions: RegionConfig
    nouns: NounConfig
    loss: LossConfig
    views: ViewConfig
    shuffle: Shuffle
    optimisation: Optimisation

    def __post_init__(self) -> None:
        if self.regions.tune != "none" and self.regions.strategy != "context":
            raise ParamsError(f"train.scg.regions: strategy {self.regions.strategy} has nothing to tune: set tune none")

    @property
    def seed(self) -> int:
        """Of the fresh weights."""
        return self.optimisation.seed
