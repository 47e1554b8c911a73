"""S-Seg: a MaskFormer without its classifier, trained on image-caption pairs alone.

Two decoupled signals: pseudo-masks (clustered self-supervised features) supervise the binary masks through bipartite
matching without a no-object class; the caption supervises the mean of the query features by contrast. At test each
query is a mask with a feature that is classified against the class names.

Source: "Exploring Simple Open-Vocabulary Semantic Segmentation" (CVPR 2025, arXiv 2401.12217); card methods/sseg.md.
Deviates: no official code exists; what the paper leaves open is a parameter (card section 17). Losses follow Eq. 4
(sums, no halves), not Fig. 5 (which halves them). Masks are compared at the prediction's resolution, where MaskFormer's
release upsamples the prediction to the image. At test, too, sigmoids are combined with classes there and the class
scores are upsampled, a few classes at a time; the release upsamples the logits of the masks first, which holds scores
of classes x pixels of the image all at once. Pseudo-masks are of the whole image as a square and move with the crop,
where the card clusters each crop as the student sees it: 60 % of the area has 22 x 22 of the 28 x 28 cells. At test the
harness slides windows over a short side of 448, as GroupViT's release does; the paper says 448 x 448.

Axes: batch, queries, targets (pseudo-masks), pixels (rows x columns of the mask grid), dim, classes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from pipeline.artifacts.weights import load_model
from pipeline.datasets.batches import Augmentation, PairCollate, PairTransform, seen_vocabulary
from pipeline.datasets.pairs import Shuffle
from pipeline.interfaces import OUTSIDE, TextRows, TrainBatch
from pipeline.losses.contrastive import ContrastiveLoss
from pipeline.losses.masks import Targets, matched_losses, matching_cost, split_regions
from pipeline.nn.maskformer import MaskFormer, Masks
from pipeline.nn.matching import assign
from pipeline.nn.pyramid import ConvPyramid, TimmPyramid
from pipeline.nn.reading import ReadingModule
from pipeline.nn.text import TextConfig, TextTransformer, Vocabulary
from pipeline.params import ParamsError, Range
from pipeline.text.tokenizers import BytePairTokenizer
from pipeline.training import Optimisation
from pipeline.training.distributed import balanced, gather_rows, summed
from pipeline.training.phases import Phase, TrainingData

Count = Annotated[int, Range(1)]
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0)]


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """The image network below the decoders.

    Attributes:
        kind: `conv` (small residual pyramid) or `timm` (a `features_only` model).
        name: timm's model name; empty for `conv`.
        first_stride: of `conv`, pixels.
        widths: channels of each map of `conv`, finest first.
        blocks: residual blocks per map of `conv`.
        init: `random`, `selfsup` (the trained DINO tower's stem) or `imagenet_sup` (timm's weights). Card section 3.1.
    """

    kind: Literal["conv", "timm"]
    name: str
    first_stride: Count
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    init: Literal["random", "selfsup", "imagenet_sup"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderConfig:
    """Widths and sizes of the two decoders.

    Attributes:
        pixel_dim: width of the pixel decoder.
        mask_dim: width of the per-pixel and the mask embeddings.
        dim: width of the queries; hidden: of their feed-forward layers.
    """

    pixel_dim: Count
    mask_dim: Count
    dim: Count
    queries: Count
    layers: Count
    heads: Count
    hidden: Count
    dropout: Share


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Weights of Eq. 1 and Eq. 4, and what the paper leaves open.

    Attributes:
        mask, contrastive, focal, dice: weights; focal and dice also weigh the matching cost.
        deep_supervision: mask loss on every decoder layer's output, or on the last.
        pooling: order of averaging the queries and projecting them (card section 5).
        temperature, max_scale: initial temperature, cap of its inverse.
    """

    mask: Weight
    contrastive: Weight
    focal: Weight
    dice: Weight
    deep_supervision: bool
    pooling: Literal["pool_then_project", "project_then_pool"]
    temperature: Annotated[float, Range(0, low_open=True)]
    max_scale: Annotated[float, Range(0, low_open=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The block train.sseg.

    Attributes:
        embed_dim: of the space that image and text share.
        combine: `normalised` (sum of class probability x sigmoid mask, divided by the sum of sigmoids) or `argmax`
            (each pixel takes its strongest query's class probabilities). Card section 8, rules a and b.
    """

    backbone: BackboneConfig
    decoder: DecoderConfig
    text: TextConfig
    loss: LossConfig
    embed_dim: Count
    combine: Literal["normalised", "argmax"]
    augmentation: Augmentation
    shuffle: Shuffle
    optimisation: Optimisation

    @property
    def seed(self) -> int:
        """Of the fresh weights."""
        return self.optimisation.seed


def combine_normalised(
    probabilities: Float[Tensor, "queries classes"], masks: Float[Tensor, "queries rows columns"]
) -> Float[Tensor, "classes rows columns"]:
    """Mean of the queries' class probabilities, weighted by their sigmoid masks; in [0, 1], sums to 1 over classes.

    Deviates: MaskFormer's sum is not divided by the sum of the masks; without a no-object class it can exceed 1.
    """
    return torch.einsum("qc,qhw->chw", probabilities, masks) / masks.sum(dim=0).clamp(min=1e-6)


def combine_argmax(
    probabilities: Float[Tensor, "queries classes"], masks: Float[Tensor, "queries rows columns"]
) -> Float[Tensor, "classes rows columns"]:
    """Each pixel has the class probabilities of the query whose mask is strongest there."""
    return probabilities[masks.argmax(dim=0)].permute(2, 0, 1)


COMBINE = {"normalised": combine_normalised, "argmax": combine_argmax}


class SSeg(ReadingModule):
    """MaskFormer, text tower, and a two-layer projection of each into the shared space (S-Seg 3.2-3.6)."""

    def __init__(self, config: Config, vocabulary: Vocabulary | None) -> None:
        super().__init__()
        decoder, text = config.decoder, config.text
        self.settings, self.combine = config.loss, COMBINE[config.combine]
        self.maskformer = MaskFormer(
            _backbone(config.backbone, config.augmentation.image_size),
            pixel_dim=decoder.pixel_dim,
            mask_dim=decoder.mask_dim,
            dim=decoder.dim,
            queries=decoder.queries,
            layers=decoder.layers,
            heads=decoder.heads,
            hidden=decoder.hidden,
            dropout=decoder.dropout,
        )
        self.tokenizer = BytePairTokenizer(text.context_length)
        self.text = TextTransformer(
            text,
            vocab_size=self.tokenizer.vocab_size,
            end_token=self.tokenizer.eot,
            out_dim=None,
            vocabulary=vocabulary,
            block="clip",
        )
        self.image_projection = _projection(decoder.dim, config.embed_dim)
        self.text_projection = _projection(text.width, config.embed_dim)
        self.contrast = ContrastiveLoss(
            temperature=config.loss.temperature, max_scale=config.loss.max_scale, gather=gather_rows
        )
        self.register_buffer("matches", torch.zeros(decoder.queries, dtype=torch.int64))
        self.matches: Int64[Tensor, " queries"]
        """How often each query has been matched (last layer, all of the training); collapse shows here."""

    @property
    def one_softmax(self) -> bool:
        """Whether a cell has the probabilities of one query; `combine_normalised` mixes those of all."""
        return self.combine is combine_argmax

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit vector of the whole image."""
        return self._pool(self.maskformer(pixels, all_layers=False).features[-1])

    def project_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """Text vectors in the shared space before they are normalised."""
        return self.text_projection(self.text(self.tokenizer(texts).to(self.matches.device)))

    def encode_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """Unit vectors."""
        return F.normalize(self.project_text(texts).float(), dim=-1)

    def loss(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Named terms and `total` (Eq. 4); the terms are unweighted, per layer where there is deep supervision.

        `focal` and `dice` sum over the supervised layers. `winners` is not optimised: the effective number of queries
        (exponential of the entropy) that share the batch's matches.

        Raises:
            BadCost: masks have diverged, so that they match nothing.
        """
        settings = self.settings
        masks = self.maskformer(batch.pixels, all_layers=settings.deep_supervision)
        contrast = self.contrast(self._pool(masks.features[-1]), self._embed_text(batch.texts))
        with torch.autocast(batch.pixels.device.type, enabled=False):
            focal, dice, winners = self._mask_losses(masks, batch)
        mask = settings.focal * focal + settings.dice * dice
        total = settings.mask * mask + settings.contrastive * (contrast.image_to_text + contrast.text_to_image)
        return {
            "total": total,
            "focal": focal,
            "dice": dice,
            "image_to_text": contrast.image_to_text,
            "text_to_image": contrast.text_to_image,
            "winners": winners,
        }

    def watch(self) -> dict[str, Tensor]:
        """`matches` so far, by query."""
        return {"matches": self.matches}

    def segment(
        self, pixels: Float[Tensor, "1 3 height width"], class_embeddings: Float[Tensor, "classes dim"]
    ) -> Float[Tensor, "classes rows columns"]:
        """Class scores on the mask grid, in [0, 1]; softmax over the given classes, which hold no background.

        Source: S-Seg 3.3 (cosine over temperature, softmax), card section 8.
        """
        features, logits = self.seen(pixels)
        probabilities = (self.contrast.scale * features @ class_embeddings.float().T).softmax(dim=-1)
        return self.combine(probabilities, logits.float().sigmoid())

    def regions(self, pixels: Float[Tensor, "1 3 height width"]) -> Int64[Tensor, "rows columns"]:
        """The query whose mask is strongest, per cell of the mask grid."""
        return self.seen(pixels)[1].argmax(dim=0)

    def _read(
        self, pixels: Float[Tensor, "windows 3 height width"]
    ) -> list[tuple[Float[Tensor, "queries dim"], Float[Tensor, "queries rows columns"]]]:
        """Unit vectors of the queries, and the logits of their masks."""
        masks = self.maskformer(pixels, all_layers=False)
        features = F.normalize(self.image_projection(masks.features[-1]).float(), dim=-1)
        return list(zip(features, masks.logits[-1], strict=True))

    def _pool(self, features: Float[Tensor, "batch queries dim"]) -> Float[Tensor, "batch embed"]:
        """All queries count, matched or not (S-Seg 3.5)."""
        if self.settings.pooling == "pool_then_project":
            return F.normalize(self.image_projection(features.mean(dim=1)).float(), dim=-1)
        return F.normalize(self.image_projection(features).mean(dim=1).float(), dim=-1)

    def _embed_text(self, texts: Int64[Tensor, "texts length"] | TextRows) -> Float[Tensor, "texts dim"]:
        return F.normalize(self.text_projection(self.text(texts)).float(), dim=-1)

    def _mask_losses(
        self, masks: Masks, batch: TrainBatch
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
        if batch.regions is None:
            raise ValueError("S-Seg learns from pseudo-masks, and this batch has none")
        logits = masks.logits.float().flatten(3)
        targets = split_regions(_resize_labels(batch.regions, masks.logits.shape[-2:]).flatten(1), OUTSIDE)
        focal, dice = logits.new_zeros(()), logits.new_zeros(())
        matched = torch.empty(0)
        for layer in logits:
            matched = self._match(layer, targets)
            layer_focal, layer_dice = matched_losses(layer, targets.masks, targets.valid, matched)
            focal, dice = focal + layer_focal, dice + layer_dice
        own = torch.bincount(matched[matched >= 0], minlength=logits.shape[2])
        focal, dice = balanced(focal, own.sum()), balanced(dice, own.sum())
        counts = summed(own)
        self.matches += counts
        share = counts / counts.sum().clamp(min=1)
        return focal, dice, torch.special.entr(share).sum().exp()

    @torch.no_grad()
    def _match(self, logits: Float[Tensor, "batch queries pixels"], targets: Targets) -> Int64[Tensor, "batch targets"]:
        settings = self.settings
        cost = matching_cost(
            logits, targets.masks, targets.valid, focal_weight=settings.focal, dice_weight=settings.dice
        )
        return assign(cost, targets.present)


def _projection(inside: int, outside: int) -> nn.Sequential:
    """Two-layer MLP. Source: S-Seg 3.5; its hidden width and activation are not stated."""
    return nn.Sequential(nn.Linear(inside, inside), nn.ReLU(), nn.Linear(inside, outside))


def _resize_labels(regions: Tensor, size: torch.Size) -> Tensor:
    if regions.shape[-2:] == size:
        return regions
    return F.interpolate(regions[:, None].float(), size=size, mode="nearest-exact")[:, 0].to(regions.dtype)


TARGETS = ("pseudo_masks",)
ENCODERS = ("dino",)


def vocabulary(config: Config, data: TrainingData) -> Vocabulary | None:
    """The tokens of the captions where `text.vocabulary` is `seen`."""
    return seen_vocabulary(config.text, data.shards)


def build(config: Config, vocabulary: Vocabulary | None) -> SSeg:
    """The model with fresh weights; `vocabulary` None gives every BPE id its own embedding."""
    return SSeg(config, vocabulary)


def phases(model: SSeg, config: Config, data: TrainingData) -> list[Phase]:
    """The only one."""
    prepare = PairTransform(
        views=config.augmentation, grid=target_grid(config), caption_form=config.augmentation.caption_form
    )
    return [
        Phase(
            optimisation=config.optimisation,
            prepare=prepare,
            collate=PairCollate(model.tokenizer, rows=config.text.takes_rows),
            loss=lambda batch, _: model.loss(batch),
        )
    ]


def start(model: SSeg, config: Config, encoders: Path) -> None:
    """Put the DINO tower's stem into the backbone where `backbone.init` is `selfsup`.

    Raises:
        ParamsError: the backbone cannot take it.
    """
    if config.backbone.init != "selfsup":
        return
    backbone = model.maskformer.backbone
    if not isinstance(backbone, ConvPyramid):
        raise ParamsError("train.sseg.backbone.init: selfsup needs kind conv; a timm backbone has no DINO tower here")
    state, _ = load_model(encoders / "dino")
    stem = {name.split("stem.layers.")[1]: value for name, value in state.items() if "stem.layers." in name}
    if not stem:
        raise ParamsError("train.sseg.backbone.init: selfsup needs a DINO tower trained here; take random")
    try:
        backbone.load_stem(stem)
    except ValueError as error:
        raise ParamsError(f"train.sseg.backbone: {error}") from error


def target_grid(config: Config) -> int:
    """Side of the mask grid: the resolution of the backbone's finest map."""
    stride = 4 if config.backbone.kind == "timm" else config.backbone.first_stride
    return config.augmentation.image_size // stride


def _backbone(config: BackboneConfig, image_size: int) -> nn.Module:
    if config.kind == "timm":
        return TimmPyramid(config.name, image_size=image_size, pretrained=config.init == "imagenet_sup", norms=True)
    return ConvPyramid(first_stride=config.first_stride, widths=config.widths, blocks=config.blocks)
