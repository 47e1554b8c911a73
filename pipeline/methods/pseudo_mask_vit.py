"""S-Seg's baseline B2, "Pseudo-mask ViT": a CLIP from scratch whose image vector is pooled segment by segment.

The tokens of a plain ViT are averaged inside each pseudo-mask, the segments' vectors are averaged to the image's, and
that is contrasted with the caption. At test the segments of the picture are classified one by one: the model learns
names and no shapes.

Source: "Exploring Simple Open-Vocabulary Semantic Segmentation" (arXiv 2401.12217) 4.2 and Table 3; card
methods/sseg.md section 10. Means are assumed there, the ViT's size is not given.
Deviates: the paper leaves open whether vectors are projected before or after they are pooled. The projection is CLIP's,
linear and without bias, so that means before and after it are the same. A token on the border of two masks counts in
both by the share of its cells. The loss is S-Seg's, the sum of the two directions; CLIP halves it.

Inference needs the pseudo-masks of pictures that no stage has seen. How they are made is read from the payloads that
the model learns from and kept among its weights (`Recipe`), so that no setting stands in two places; the DINO that
gives the tokens is lent. It then runs in float32, whatever `features.precision` was.

Axes: batch, dim, classes, segments; tokens = patch_rows * patch_columns of the ViT; rows, columns of the masks' grid.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from pipeline import params
from pipeline.artifacts.arrays import map_array
from pipeline.artifacts.files import BadInput, read_json
from pipeline.caching import features, pseudo_masks
from pipeline.datasets.batches import Augmentation, PairCollate, PairTransform, seen_vocabulary
from pipeline.datasets.joined import PairShard, Table, count_rows, join
from pipeline.datasets.pairs import Shuffle
from pipeline.encoders import load_dino
from pipeline.encoders.small_vit import TowerConfig
from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD, OUTSIDE, Facet, PatchEncoder, TrainBatch
from pipeline.losses.contrastive import ContrastiveLoss
from pipeline.nn.reading import ReadingModule
from pipeline.nn.text import TextConfig, TextTransformer, Vocabulary
from pipeline.params import ParamsError, Range
from pipeline.store import PAYLOAD, repair_command
from pipeline.text.tokenizers import BytePairTokenizer
from pipeline.training import Optimisation
from pipeline.training.distributed import gather_rows
from pipeline.training.phases import Phase, TrainingData

Count = Annotated[int, Range(1)]
Positive = Annotated[float, Range(0, low_open=True)]
# Least cosine of a region's mean token with its stored centroid. Stored tokens and centroids are float16, and the
# encoder may have run in bfloat16 or on another machine; another facet's or tower's tokens are nowhere near.
SAME_TOKENS = 0.98
REMEDY = "Run `dvc repro pseudo_masks`"


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The block train.pseudo_mask_vit.

    Attributes:
        embed_dim: of the space that image and text share.
        temperature: of the contrast, at the start; learned.
        max_scale: cap of its inverse.
    """

    tower: TowerConfig
    text: TextConfig
    embed_dim: Count
    temperature: Positive
    max_scale: Positive
    augmentation: Augmentation
    shuffle: Shuffle
    optimisation: Optimisation

    def __post_init__(self) -> None:
        if self.tower.class_token:
            raise ParamsError("train.pseudo_mask_vit.tower.class_token: it lies in no segment; set it to false")
        if self.tower.image_size != self.augmentation.image_size:
            raise ParamsError("train.pseudo_mask_vit.tower.image_size: differs from augmentation.image_size")

    @property
    def seed(self) -> int:
        """Of the fresh weights."""
        return self.optimisation.seed


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How the cached pseudo-masks were made of an image.

    Attributes:
        image_size: side of the square that DINO sees, pixels.
        facet: of its tokens.
        masks: the block `pseudo_masks` of that run.
    """

    image_size: Count
    facet: Facet
    masks: pseudo_masks.Config

    def regions(
        self, dino: PatchEncoder, images: Sequence[UInt8[np.ndarray, "height width 3"]], device: str
    ) -> UInt8[Tensor, "batch rows columns"]:
        """Pseudo-masks of images outside any shard, on the CPU; seeds are hashes of their pixels, as the oracle's."""
        tokens = features.extract(dino, images, token_config(self.image_size, self.facet, len(images)), device)
        names = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        return pseudo_masks.regions(tokens, names, self.masks)[0]


def token_config(image_size: int, facet: Facet, batch_size: int) -> features.Config:
    """What `features.extract` is told; nothing is stored, so there are no chunks."""
    return features.Config(
        image_size=image_size,
        facet=facet,
        precision="float32",
        batch_size=batch_size,
        chunk_rows=batch_size,
        store="none",
    )


def read_recipe(shards: Sequence[PairShard], dino: PatchEncoder) -> Recipe:
    """The recipe of the shards' masks, held against this tower on the first image.

    A payload names its own parameters but not the features': the grid tells the image size, and the facet is the one
    whose mean tokens are the stored centroids.

    Raises:
        BadInput: the payloads were not made alike, hold no mask, or were made of another tower's tokens.
        ParamsError: they were made with parameters that this version does not know.
    """
    found: list[pseudo_masks.Config] = []
    for shard in shards:
        if shard.masks is None:
            raise BadInput(f"shard {shard.name}", "has no pseudo-masks", REMEDY)
        path = shard.masks / PAYLOAD
        fields = read_json(path, repair_command("pseudo_masks"))["fields"]
        found.append(params.build(pseudo_masks.Config, fields["params"], str(path)))
        if found[-1] != found[0]:
            raise BadInput(path, f"was made with other parameters than shard {shards[0].name}", REMEDY)
    first = next((shard for shard in shards if count_rows(shard)), None)
    if first is None or first.masks is None:
        raise BadInput("pseudo_masks", "holds no mask", "Check the filter")
    sample: Any = Table(first, join(first)).slice(0, 1).row(0)
    size = len(sample.regions) * dino.patch_size
    labels = torch.from_numpy(sample.regions.flatten())
    stored = torch.from_numpy(np.array(map_array(first.masks / pseudo_masks.CENTROIDS)[0], np.float32))
    for facet in get_args(Facet):
        tokens = features.extract(dino, [sample.image.read()], token_config(size, facet, 1), "cpu")[0].float()
        if same_tokens(tokens, labels, stored):
            return Recipe(image_size=size, facet=facet, masks=found[0])
    raise BadInput(first.masks, "its regions are not of the tokens of models/encoders/dino", REMEDY)


def same_tokens(
    tokens: Float[Tensor, "tokens dim"], labels: UInt8[Tensor, " tokens"], centroids: Float[Tensor, "segments width"]
) -> bool:
    """Whether the regions' mean unit tokens point where the stored centroids do; centroids may have another width."""
    if tokens.shape[1] != centroids.shape[1]:
        return False
    unit = F.normalize(tokens, dim=1)
    means = [(unit[labels == region].mean(dim=0), centroids[region]) for region in labels.unique().tolist()]
    return all(F.cosine_similarity(mean, centroid, dim=0) > SAME_TOKENS for mean, centroid in means)


def pool_segments(
    tokens: Float[Tensor, "batch tokens dim"],
    grid: tuple[int, int],
    regions: UInt8[Tensor, "batch rows columns"],
    count: int,
) -> tuple[Float[Tensor, "batch {count} dim"], Bool[Tensor, "batch {count}"]]:
    """Mean token of each of the regions 0 to `count` - 1, and which regions there are; an absent one's mean is 0.

    `grid`: rows and columns of the tokens. A token's weight in a region is the share of its cells with that label;
    cells with other labels, OUTSIDE among them, belong to no region.
    """
    wanted = torch.arange(count, device=regions.device)[:, None, None]
    weights = F.adaptive_avg_pool2d((regions[:, None] == wanted).float(), grid).flatten(2)
    mass = weights.sum(dim=2, keepdim=True)
    present = mass > 0
    return weights @ tokens.float() / torch.where(present, mass, 1), present[..., 0]


def pool_image(
    segments: Float[Tensor, "batch segments dim"], present: Bool[Tensor, "batch segments"]
) -> Float[Tensor, "batch dim"]:
    """Mean over the segments that are there; 0 where none is."""
    return (segments * present[..., None]).sum(dim=1) / present.sum(dim=1, keepdim=True).clamp(min=1)


def image_bytes(pixels: Float[Tensor, "batch 3 height width"]) -> UInt8[np.ndarray, "batch height width 3"]:
    """ImageNet-normalised pixels as the bytes they came from."""
    mean, std = (torch.tensor(v, device=pixels.device)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    colours = ((pixels.float() * std + mean) * 255).round().clamp(0, 255).byte()
    return np.ascontiguousarray(colours.permute(0, 2, 3, 1).cpu().numpy())


class PseudoMaskViT(ReadingModule):
    """ViT and text tower; a DINO that is lent to it (`lend`) and not saved, and the recipe, which is."""

    one_softmax = True

    def __init__(self, config: Config, vocabulary: Vocabulary | None) -> None:
        super().__init__()
        text = config.text
        self._lent: tuple[PatchEncoder, ...] = ()
        self.recipe: Recipe | None = None
        self.tower = config.tower.build()
        self.projection = nn.Linear(config.tower.dim, config.embed_dim, bias=False)
        self.tokenizer = BytePairTokenizer(text.context_length)
        self.text = TextTransformer(
            config.text,
            vocab_size=self.tokenizer.vocab_size,
            end_token=self.tokenizer.eot,
            out_dim=config.embed_dim,
            vocabulary=vocabulary,
            block="clip",
        )
        self.contrast = ContrastiveLoss(temperature=config.temperature, max_scale=config.max_scale, gather=gather_rows)

    def lend(self, dino: PatchEncoder) -> None:
        """Make masks of this DINO's tokens. It is neither among the parameters nor in the state."""
        self._lent = (dino,)

    @property
    def dino(self) -> PatchEncoder:
        """The DINO that was lent.

        Raises:
            ValueError: none was.
        """
        if not self._lent:
            raise ValueError("the pseudo-mask ViT makes no masks of its own: `attach` lends it the DINO they come from")
        return self._lent[0]

    def get_extra_state(self) -> Tensor:
        """The recipe as JSON bytes, none before `phases` has read it; torch saves it as `_extra_state`."""
        known = b"" if self.recipe is None else json.dumps(params.plain(self.recipe), sort_keys=True).encode()
        return torch.tensor(list(known), dtype=torch.uint8)

    def set_extra_state(self, state: Tensor) -> None:
        """Put a saved recipe back."""
        saved = bytes(state.tolist())
        self.recipe = params.build(Recipe, json.loads(saved), "recipe") if saved else None

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit vector of the whole image."""
        segments, present = self._segments(pixels, *self._regions(pixels))
        return F.normalize(pool_image(segments, present), dim=-1)

    def project_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """Text vectors in the shared space before they are normalised."""
        return self.text(self.tokenizer(texts).to(self.projection.weight.device))

    def encode_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """Unit vectors."""
        return F.normalize(self.project_text(texts).float(), dim=-1)

    def segment(
        self, pixels: Float[Tensor, "1 3 height width"], class_embeddings: Float[Tensor, "classes dim"]
    ) -> Float[Tensor, "classes rows columns"]:
        """Class scores on the masks' grid, in [0, 1]: those of the segment, softmax over the given classes.

        Source: S-Seg 4.2 (segments are classified); cosine over temperature as in 3.3.
        """
        segments, regions = self.seen(pixels)
        logits = self.contrast.scale * segments @ class_embeddings.float().T
        return logits.softmax(dim=-1).T[:, regions.long()]

    def regions(self, pixels: Float[Tensor, "1 3 height width"]) -> Int64[Tensor, "rows columns"]:
        """The picture's pseudo-masks."""
        return self.seen(pixels)[1].long()

    def _read(
        self, pixels: Float[Tensor, "windows 3 height width"]
    ) -> list[tuple[Float[Tensor, "segments dim"], UInt8[Tensor, "rows columns"]]]:
        """Unit vectors of the segments, and where these lie."""
        regions, count = self._regions(pixels)
        segments, _ = self._segments(pixels, regions, count)
        return list(zip(F.normalize(segments, dim=-1), regions, strict=True))

    def loss(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Named terms and `total`, their sum. `segments` is not optimised: how many an image has, on average."""
        if batch.regions is None:
            raise ValueError("the pseudo-mask ViT learns from pseudo-masks, and this batch has none")
        labels = batch.regions.long()
        count = int(torch.where(labels == OUTSIDE, 0, labels).max()) + 1
        segments, present = self._segments(batch.pixels, batch.regions, count)
        image = F.normalize(pool_image(segments, present), dim=-1)
        contrast = self.contrast(image, F.normalize(self.text(batch.texts).float(), dim=-1))
        return {
            "total": contrast.image_to_text + contrast.text_to_image,
            "image_to_text": contrast.image_to_text,
            "text_to_image": contrast.text_to_image,
            "segments": present.sum(dim=1).float().mean(),
        }

    def _segments(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        regions: UInt8[Tensor, "batch rows columns"],
        count: int,
    ) -> tuple[Float[Tensor, "batch {count} dim"], Bool[Tensor, "batch {count}"]]:
        """Projected vectors of the regions, not normalised, and which regions there are."""
        patch = self.tower.patch_size
        grid = (pixels.shape[-2] // patch, pixels.shape[-1] // patch)
        segments, present = pool_segments(self.tower(pixels), grid, regions, count)
        return self.projection(segments).float(), present

    @torch.no_grad()
    def _regions(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> tuple[UInt8[Tensor, "batch rows columns"], int]:
        """Pseudo-masks of pictures, each squashed to DINO's square, and how many there can be.

        Raises:
            ValueError: the model knows no recipe: it was neither trained nor loaded.
        """
        if self.recipe is None:
            raise ValueError("how pseudo-masks are made is learned from the cached ones: train pseudo_mask_vit first")
        device = pixels.device
        regions = self.recipe.regions(self.dino.to(str(device)), list(image_bytes(pixels)), str(device))
        return regions.to(device), self.recipe.masks.k


TARGETS = ("pseudo_masks",)
ENCODERS = ("dino",)
GIVEN = ("_extra_state",)


def vocabulary(config: Config, data: TrainingData) -> Vocabulary | None:
    """The tokens of the captions where `text.vocabulary` is `seen`."""
    return seen_vocabulary(config.text, data.shards)


def build(config: Config, vocabulary: Vocabulary | None) -> PseudoMaskViT:
    """The model with fresh weights, without a DINO; `vocabulary` None gives every BPE id its own embedding."""
    return PseudoMaskViT(config, vocabulary)


def start(model: PseudoMaskViT, config: Config, encoders: Path) -> None:
    """Nothing: both towers start from random weights (S-Seg 4.2)."""


def attach(model: PseudoMaskViT, encoders: Path) -> None:
    """Lend the DINO whose tokens the pseudo-masks are made of."""
    model.lend(load_dino(encoders / "dino"))


def phases(model: PseudoMaskViT, config: Config, data: TrainingData) -> list[Phase]:
    """The only one; regions are seen at the cached masks' own resolution.

    Raises:
        BadInput, ParamsError: see `read_recipe`.
    """
    model.recipe = read_recipe(data.shards, model.dino)
    views, grid = config.augmentation, model.recipe.image_size // model.dino.patch_size
    return [
        Phase(
            optimisation=config.optimisation,
            prepare=PairTransform(views=views, grid=grid, caption_form=views.caption_form),
            collate=PairCollate(model.tokenizer, rows=config.text.takes_rows),
            loss=lambda batch, _: model.loss(batch),
        )
    ]
