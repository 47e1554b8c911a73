"""ZeroSeg: segments that imitate a frozen CLIP's image vectors; no caption and no label is read.

A masked autoencoder gets a second head whose grouping ends in a few segment tokens. The image vector (their projected
mean) is pulled to cached CLIP vectors of all views of the image, every segment token to that of its nearest tile, and
hidden patches are painted. At test the same CLIP's text tower names the segments.

Source: ZeroSeg, "Exploring Open-Vocabulary Semantic Segmentation from CLIP Vision Encoder Distillation Only" (ICCV
2023, arXiv 2306.00450); card methods/zeroseg.md. Only this training is without texts: CLIP has seen them.
Deviates: code, weights and hyper-parameters of the paper are not public; what it leaves open is a parameter (card
section 9), and the parts follow the code that it builds on, MAE's and GroupViT's. The square is the stored image's
largest centred one, not a 224 crop of a 256 resize, and tiles are cut from it at the stored resolution. Cached views
are unit vectors, so raw CLIP vectors cannot be tried. Of the small configs, see `pipeline.nn.masked_autoencoder`.

Axes: batch, groups (segments), dim (of CLIP's space), views, tokens (patches), rows x columns (patch grid), classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.artifacts.files import BadInput
from pipeline.datasets.pairs import Shuffle
from pipeline.datasets.squares import SquareTransform, choose_views, collate
from pipeline.encoders import load_clip
from pipeline.interfaces import ClipEncoder, TrainBatch
from pipeline.losses.views import (
    Reduction,
    ViewReduction,
    distinct_tiles,
    match_loss,
    multi_scale_loss,
    reconstruction_loss,
    view_weights,
)
from pipeline.nn.group_model import GroupModel
from pipeline.nn.group_reader import GroupReading
from pipeline.nn.grouping import Grouped, GroupingConfig, GroupingStages, effective_number
from pipeline.nn.masked_autoencoder import (
    DecoderConfig,
    Encoded,
    EncoderConfig,
    MaskedAutoencoder,
    normalise_patches,
    patchify,
)
from pipeline.nn.projector import Projector, demand_rows
from pipeline.nn.text import Vocabulary
from pipeline.params import ParamsError, Range
from pipeline.training import Optimisation
from pipeline.training.phases import Phase, TrainingData

Count = Annotated[int, Range(1)]
Weight = Annotated[float, Range(0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProjectorConfig:
    """From segments to CLIP's space; card section 9, decision 8.

    Attributes:
        hidden: width of the layer between.
        norm: of that layer: `batch` (GroupViT's) or `layer`.
        shared: one module projects the image's vector and the segments', as GroupViT's does at test.
    """

    hidden: Count
    norm: Literal["batch", "layer"]
    shared: bool

    @property
    def needs_images(self) -> bool:
        """Whether one image's vector is all that BatchNorm would see of a batch of one."""
        return self.norm == "batch" and not self.shared


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights, reductions and switches; card section 4 and decisions 1, 2 and 10.

    Attributes:
        reconstruction, multi_scale, match: weights.
        all_views: the image's vector imitates all views, or the whole square alone (paper Table 4, first row).
        over_dims: of L1 distances.
        over_views: `sum`, `mean`, or `scale_mean` (every grid counts the same).
        over_segments: of the matching loss; Eq. 1 sums.
        unit_image, unit_segments: bring the vectors to length 1 before they are compared with views, which have it.
        normalised_patches: paint patches of mean 0 and variance 1 (MAE's `norm_pix_loss`).
    """

    reconstruction: Weight
    multi_scale: Weight
    match: Weight
    all_views: bool
    over_dims: Reduction
    over_views: ViewReduction
    over_segments: Reduction
    unit_image: bool
    unit_segments: bool
    normalised_patches: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The block train.zeroseg.

    Attributes:
        head: the grouping; `gumbel` is the card's decision 9.
        head_input: `visible` (the encoder's patches) or `decoded` (the decoder's, hidden places filled); decision 7.
        embed_dim: width of CLIP's space.
        scales: grids whose views are learned from, 1 (the whole square) first; the cache may hold more.
        logit_scale: of cosines at test; null: CLIP's own.
    """

    encoder: EncoderConfig
    decoder: DecoderConfig
    head: GroupingConfig
    head_input: Literal["visible", "decoded"]
    projector: ProjectorConfig
    embed_dim: Count
    scales: tuple[Count, ...]
    loss: LossConfig
    logit_scale: Annotated[float, Range(0, low_open=True)] | None
    shuffle: Shuffle
    optimisation: Optimisation

    def __post_init__(self) -> None:
        if self.scales[:1] != (1,) or len(set(self.scales)) < len(self.scales):
            raise ParamsError(f"train.zeroseg.scales: {list(self.scales)} must begin with 1 and repeat nothing")
        if len(self.scales) == 1 and self.loss.match:
            raise ParamsError("train.zeroseg.scales: without tiles there is nothing to match; set loss.match to 0")
        if self.projector.needs_images:
            demand_rows(self.optimisation.micro_batch, "train.zeroseg.optimisation")

    @property
    def seed(self) -> int:
        """Of the fresh weights."""
        return self.optimisation.seed


class ZeroSeg(GroupModel):
    """Masked autoencoder, grouping head, projector; and a CLIP that is lent to it (`lend`) and not saved."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.settings, self.scales, self.embed_dim = config.loss, config.scales, config.embed_dim
        self._logit_scale, self._lent = config.logit_scale, ()
        self.autoencoder = MaskedAutoencoder(config.encoder, config.decoder)
        self.decoded = config.head_input == "decoded"
        inside, dim = config.decoder.dim if self.decoded else config.encoder.dim, config.head.dim
        self.head_input = nn.Identity() if inside == dim else nn.Linear(inside, dim)
        self.grouping = GroupingStages(config.head)
        self.projector = _projector(dim, config.embed_dim, config.projector)
        shared, self.needs_images = config.projector.shared, config.projector.needs_images
        self.segment_projector = None if shared else _projector(dim, config.embed_dim, config.projector)

    def lend(self, clip: ClipEncoder) -> None:
        """Use this CLIP's text tower. It is neither among the parameters nor in the state."""
        self._lent: tuple[ClipEncoder, ...] = (clip,)

    @property
    def clip(self) -> ClipEncoder:
        """The CLIP that was lent.

        Raises:
            ValueError: none was.
        """
        if not self._lent:
            raise ValueError("ZeroSeg has no text tower of its own: `attach` lends it the CLIP that made its views")
        return self._lent[0]

    @property
    def logit_scale(self) -> float:
        """What cosines are multiplied with: the config's, or CLIP's own, since none is learned. Card section 6."""
        return self.clip.logit_scale if self._logit_scale is None else self._logit_scale

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit vector of the whole image in CLIP's space."""
        _, grouped, _ = self._forward(pixels)
        return F.normalize(self._project(grouped.segments)[0].float(), dim=-1)

    def encode_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """CLIP's unit vectors; it gives no others, so there is no `project_text`."""
        device = self.autoencoder.cls_token.device
        return self.clip.to(str(device)).encode_text(texts).to(device)

    def _read(self, pixels: Float[Tensor, "windows 3 height width"]) -> list[GroupReading]:
        """Vectors of segments and images, and the segments' soft maps. Source: card section 6 (GroupViT's rules).

        Raises:
            ValueError: in training mode, which hides patches.
        """
        if self.training:
            raise ValueError("in training mode patches are hidden and out of order: call eval() first")
        encoded, grouped, _ = self._forward(pixels)
        image, segments = (F.normalize(found.float(), dim=-1) for found in self._project(grouped.segments))
        maps = grouped.soft_maps().unflatten(2, encoded.grid)
        return list(zip(segments, image, maps, strict=True))

    def loss(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Named terms, unweighted, and `total`, their weighted sum.

        Not optimised: `tiles`, the distinct nearest tiles of an image's segments, and `groups`, the effective number
        of groups that an image's patches fall into (exponential of the entropy).

        Raises:
            BadInput: a single image, in training, where BatchNorm sees one vector of each.
        """
        if batch.views is None:
            raise ValueError("ZeroSeg learns from cached views, and this batch has none")
        if self.needs_images:
            self.projector.demand_rows(batch.uids)
        settings = self.settings
        encoded, grouped, decoded = self._forward(batch.pixels)
        self.sizes = grouped.sizes()
        predicted = self.autoencoder.predict(self.autoencoder.decode(encoded) if decoded is None else decoded)
        image, segments = self._project(grouped.segments)
        with torch.autocast(batch.pixels.device.type, enabled=False):
            target = patchify(batch.pixels, self.autoencoder.patch_size)
            if settings.normalised_patches:
                target = normalise_patches(target)
            reconstruction = reconstruction_loss(predicted.float(), target, encoded.masking.hidden)
            views = F.normalize(batch.views.float(), dim=-1)
            multi_scale = self._multi_scale(_unit(image.float(), settings.unit_image), views)
            match, tiles = self._match(_unit(segments.float(), settings.unit_segments), views)
        return {
            "total": settings.reconstruction * reconstruction
            + settings.multi_scale * multi_scale
            + settings.match * match,
            "reconstruction": reconstruction,
            "multi_scale": multi_scale,
            "match": match,
            "tiles": tiles,
            "groups": effective_number(self.sizes),
        }

    def _multi_scale(
        self, image: Float[Tensor, "batch dim"], views: Float[Tensor, "batch views dim"]
    ) -> Float[Tensor, ""]:
        settings = self.settings
        weights = view_weights(self.scales if settings.all_views else (1,), settings.over_views)
        return multi_scale_loss(image, views[:, : len(weights)], weights, over_dims=settings.over_dims)

    def _match(
        self, segments: Float[Tensor, "batch groups dim"], views: Float[Tensor, "batch views dim"]
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """The loss, and how many tiles were chosen. View 0, the whole square, is none; without tiles both are 0."""
        settings, tiles = self.settings, views[:, 1:]
        if not tiles.shape[1]:
            return views.new_zeros(()), views.new_zeros(())
        loss, nearest = match_loss(segments, tiles, over_dims=settings.over_dims, over_segments=settings.over_segments)
        return loss, distinct_tiles(nearest, tiles.shape[1])

    def _forward(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Encoded, Grouped, Float[Tensor, "batch tokens inner"] | None]:
        """Encoder, grouping without the class token, and the decoder's patches where the head reads those."""
        encoded = self.autoencoder.encode(pixels)
        decoded = self.autoencoder.decode(encoded) if self.decoded else None
        return encoded, self.grouping(self.head_input(encoded.tokens if decoded is None else decoded)), decoded

    def _project(
        self, segments: Float[Tensor, "batch groups inner"]
    ) -> tuple[Float[Tensor, "batch dim"], Float[Tensor, "batch groups dim"]]:
        """The image's vector, from the mean over segments, and the segments', neither normalised.

        A shared projector sees both in one call, so that BatchNorm has the same statistics for both in training, as
        its running ones are at test. Card section 2.3.
        """
        pooled = segments.mean(dim=1, keepdim=True)
        if self.segment_projector is not None:
            return self.projector(pooled)[:, 0], self.segment_projector(segments)
        both = self.projector(torch.cat([pooled, segments], dim=1))
        return both[:, 0], both[:, 1:]


def _unit(vectors: Float[Tensor, "*shape"], wanted: bool) -> Float[Tensor, "*shape"]:
    return F.normalize(vectors, dim=-1) if wanted else vectors


def _projector(inside: int, outside: int, config: ProjectorConfig) -> Projector:
    projector = Projector(inside, outside, hidden=config.hidden)
    if config.norm == "layer":
        projector.add_module("norm", nn.LayerNorm(config.hidden))
    return projector


TARGETS = ("teacher",)
ENCODERS = ("clip",)


def vocabulary(config: Config, data: TrainingData) -> Vocabulary | None:
    """There is no text tower to shrink."""
    return None


def build(config: Config, vocabulary: Vocabulary | None) -> ZeroSeg:
    """The model with fresh weights, without a CLIP."""
    return ZeroSeg(config)


def start(model: ZeroSeg, config: Config, encoders: Path) -> None:
    """Nothing: the student starts from random weights (card section 5)."""


def attach(model: ZeroSeg, encoders: Path) -> None:
    """Lend the CLIP that made the views.

    Raises:
        BadInput: its space has another width.
    """
    clip = load_clip(encoders / "clip")
    if clip.embed_dim != model.embed_dim:
        problem = f"has vectors of {clip.embed_dim}, and ZeroSeg learned from ones of {model.embed_dim}"
        raise BadInput(encoders / "clip", problem, "Set train.zeroseg.embed_dim, or train ZeroSeg again")
    model.lend(clip)


def phases(model: ZeroSeg, config: Config, data: TrainingData) -> list[Phase]:
    """The only one.

    Raises:
        BadInput: the cached views do not fit the config, see `choose_views`.
    """
    chosen = choose_views(data.shards, config.scales, config.embed_dim)
    return [
        Phase(
            optimisation=config.optimisation,
            prepare=SquareTransform(image_size=config.encoder.image_size, chosen=chosen),
            collate=collate,
            loss=lambda batch, _: model.loss(batch),
            traceable=True,
        )
    ]
