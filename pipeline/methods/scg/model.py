"""The model of SCG: regions of a picture, what CLIP says of each, and the loss against nouns.

Axes: batch, clusters (regions of a picture), rows x columns (DINO's tokens; low: CLIP's), tokens (of CLIP), width (of
CLIP's tower), dim (of the joint space), nouns, classes.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int16, Int64
from torch import Tensor, nn

from pipeline.clustering import kmeans
from pipeline.datasets.region_batches import RegionBatch
from pipeline.interfaces import ClipEncoder, PatchEncoder, VisualTower
from pipeline.losses import noun_region
from pipeline.losses.contrastive import Temperature
from pipeline.methods.scg.config import Config
from pipeline.nn.codebook import pixel_groups, similarities
from pipeline.nn.noun_vectors import NounVectors
from pipeline.nn.reading import ReadingModule
from pipeline.nn.region_tokens import (
    context_vectors,
    downsample_majority,
    image_vectors,
    mean_vectors,
    members,
    token_vectors,
)
from pipeline.nn.visual_tower import renormalised, run
from pipeline.text.prompts import templates
from pipeline.training.distributed import gather_rows, summed

# Parameters of a ClipEncoder that belong to its image side, in open_clip's layout and the small one's.
IMAGE_SIDE = ("model.visual.", "tower.", "image_head.")


class SCG(ReadingModule):
    """Offsets per cluster and a temperature, between two frozen towers that are lent (SCG 3)."""

    one_softmax = True

    def __init__(self, config: Config) -> None:
        super().__init__()
        grouping, regions = config.grouping, config.regions
        self.config = config
        shared = grouping.kind == "image_kmeans"
        self.clusters = grouping.image_clusters if shared else grouping.clusters
        self.offsets = nn.Parameter(torch.zeros(regions.offset_layers, 1 if shared else self.clusters, regions.width))
        self.temperature = Temperature(temperature=1.0, max_scale=config.loss.max_scale)
        self.tuned = nn.ParameterDict()
        self.register_buffer("centroids", torch.zeros(grouping.clusters, grouping.feature_dim))
        self.centroids: Float[Tensor, "clusters feature"]
        self.register_buffer("hits", torch.zeros(self.clusters, dtype=torch.int64))
        self.hits: Int64[Tensor, " clusters"]
        """How often each cluster's token was a noun's best region in its own picture; the others learn nothing."""
        self._lent: tuple[Any, ...] = ()
        self._nouns = NounVectors(templates(config.nouns.templates))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in state:
            if name.startswith(f"{prefix}tuned."):
                self.tuned[name.removeprefix(f"{prefix}tuned.")] = nn.Parameter(torch.empty_like(state[name]))
        super()._load_from_state_dict(state, prefix, *rest)

    def lend(self, clip: Any, dino: Any) -> None:
        """Use these towers. They are neither among the parameters nor in the state, but for a tuned image side.

        Raises:
            ValueError: CLIP's patches are no whole number of DINO's, or a width is not the config's.
        """
        if clip.patch_size % dino.patch_size:
            raise ValueError(f"CLIP's patches of {clip.patch_size} px are no whole number of DINO's {dino.patch_size}")
        reader = clip
        if self.tuned:
            reader = copy.deepcopy(clip)
            for name, value in self.tuned.items():
                path, _, leaf = name.replace("/", ".").rpartition(".")
                setattr(reader.get_submodule(path), leaf, value)
        width, regions = reader.visual_tower().class_start.shape[0], self.config.regions
        if width != regions.width or dino.embed_dim != self.config.grouping.feature_dim:
            found = f"width {width} and feature_dim {dino.embed_dim}"
            raise ValueError(f"the towers have {found}: set train.scg.regions.width and grouping.feature_dim to them")
        if regions.offset_layers not in (1, len(reader.visual_tower().layers)):
            raise ValueError(f"offset_layers is neither 1 nor CLIP's {len(reader.visual_tower().layers)} layers")
        self._lent = (clip, dino, reader)

    @property
    def clip(self) -> ClipEncoder:
        """CLIP as it was lent; its text side names regions."""
        return self._towers()[0]

    @property
    def dino(self) -> PatchEncoder:
        """The encoder whose tokens are clustered."""
        return self._towers()[1]

    @property
    def visual(self) -> VisualTower:
        """CLIP's image tower, tuned where it was."""
        return self._towers()[2].visual_tower()

    def _towers(self) -> tuple[Any, ...]:
        if not self._lent:
            raise ValueError("SCG has no tower of its own: `attach` lends it CLIP and DINO")
        return tuple(tower.to(str(self.offsets.device)) for tower in self._lent)

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """CLIP's unit vector of the class token; regions have no part in it."""
        x = self.visual.embed(renormalised(pixels, self.clip.mean, self.clip.std))
        return F.normalize(self.visual.project(run(self.visual, x))[:, 0].float(), dim=-1)

    def encode_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """CLIP's unit vectors."""
        return self.clip.encode_text(texts).to(self.offsets.device)

    def segment(
        self, pixels: Float[Tensor, "1 3 height width"], class_embeddings: Float[Tensor, "classes dim"]
    ) -> Float[Tensor, "classes height width"]:
        """Class probabilities of every pixel's region: softmax over the given classes.

        Source: SCG 3.1, Region Recognition (arg max of cosines), which the softmax, for rules with a threshold, keeps.
        """
        owner, vectors = self.seen(pixels)
        probabilities = (self.temperature.scale * vectors @ class_embeddings.float().T).softmax(-1)
        return probabilities[owner.long()].permute(2, 0, 1)

    def regions(self, pixels: Float[Tensor, "1 3 height width"]) -> Int64[Tensor, "height width"]:
        """The cluster of every pixel."""
        return self.seen(pixels)[0].long()

    def _read(
        self, pixels: Float[Tensor, "windows 3 height width"]
    ) -> list[tuple[Int16[Tensor, "height width"], Float[Tensor, "clusters dim"]]]:
        """The cluster of every pixel, and each cluster's vector."""
        high, low = self._regions(pixels)
        return list(zip(high.short(), self.region_vectors(pixels, low, high), strict=True))

    @torch.no_grad()
    def _regions(
        self, pixels: Float[Tensor, "batch 3 height width"]
    ) -> tuple[Int64[Tensor, "batch height width"], Int64[Tensor, "batch low_rows low_columns"]]:
        """Clusters by pixel and by CLIP's patches, from the same similarities.

        A cluster that owns no patch of CLIP has no vector: its pixels go to the next most similar one that has.
        Source: card scg.md section 2.
        """
        size = (pixels.shape[2], pixels.shape[3])
        grid = (size[0] // self.dino.patch_size, size[1] // self.dino.patch_size)
        tokens = self.dino.patch_tokens(renormalised(pixels, self.dino.mean, self.dino.std), "tokens").float()
        found = similarities(tokens, self._centroids(tokens))
        low = self._downsample(found.argmax(-1).unflatten(1, grid))
        absent = ~members(low.flatten(1), self.clusters).any(-1)
        maps = pixel_groups(found, grid, size).masked_fill(absent[:, :, None, None], -torch.inf)
        return maps.argmax(1), low

    def _centroids(self, tokens: Float[Tensor, "batch tokens feature"]) -> Float[Tensor, "..."]:
        """The codebook, or each picture's own means."""
        if self.config.grouping.kind == "codebook":
            return self.centroids
        unit = F.normalize(tokens, dim=-1)
        seeds = torch.zeros(len(unit), dtype=torch.int64, device=unit.device)
        iters = self.config.grouping.iters
        _, means = kmeans(unit, self.clusters, iters=iters, metric="cosine", seeds=seeds, init="k-means++")
        return F.normalize(means.float(), dim=-1)

    def _downsample(self, labels: Int64[Tensor, "batch rows columns"]) -> Int64[Tensor, "batch low_rows low_columns"]:
        return downsample_majority(labels, self.visual.patch_size // self.dino.patch_size)

    def region_vectors(
        self,
        pixels: Float[Tensor, "batch 3 height width"],
        low: Int64[Tensor, "batch low_rows low_columns"],
        high: Int64[Tensor, "batch height width"] | None,
    ) -> Float[Tensor, "batch clusters dim"]:
        """Unit vectors of all clusters' regions; of those that own no patch they mean nothing.

        Strategy "image" needs the clusters by pixel, the others read those by CLIP's patches.
        """
        regions, tower = self.config.regions, self.visual
        pixels = renormalised(pixels, self.clip.mean, self.clip.std)
        if regions.strategy == "image":
            assert high is not None
            found = image_vectors(tower, pixels, high, self.clusters, fill=(0.0, 0.0, 0.0))
        elif regions.strategy == "tokens":
            found = token_vectors(tower, pixels, low.flatten(1), self.clusters)
        elif regions.strategy == "average":
            found = mean_vectors(self.clip.encode_patches(pixels).flatten(1, 2), low.flatten(1), self.clusters)
        else:
            offsets = self.offsets.expand(-1, self.clusters, -1)
            frozen = not self.tuned
            found = context_vectors(tower, pixels, low.flatten(1), offsets, extra_key=regions.extra_key, frozen=frozen)
        return F.normalize(found.float(), dim=-1)

    def loss(self, batch: RegionBatch) -> dict[str, Tensor]:
        """`total` (Eq. 3) and, not optimised, `tokens`: the effective number of clusters that nouns found.

        Pictures whose caption has no noun are left out.
        """
        named = torch.bincount(batch.owner, minlength=len(batch.groups)) > 0
        count = int(named.sum())
        if not count:  # another process or part may have nouns: take part, with a picture that is dropped below
            named[0] = True
        pixels, owner = batch.pixels[named], named.cumsum(0)[batch.owner] - 1
        if self.config.grouping.kind == "codebook":
            low = self._downsample(batch.groups[named])
        else:
            _, low = self._regions(pixels)
        vectors = self.region_vectors(pixels, low, None)
        present = members(low.flatten(1), self.clusters).any(-1)
        if not count:
            vectors, present = vectors[:0], present[:0]
        counts = torch.bincount(owner, minlength=len(vectors))[: len(vectors)]
        with torch.autocast(pixels.device.type, enabled=False):
            settings = self.config.loss
            nouns = self.noun_vectors(batch.nouns) if count else vectors.new_zeros(0, vectors.shape[-1])
            total = noun_region.loss(
                nouns,
                counts,
                vectors,
                present,
                self.temperature.capped(),
                direction=settings.direction,
                form=settings.form,
                gather=gather_rows,
            )
            hits = self._found(nouns, owner, vectors, present)
        return {"total": total, "tokens": torch.special.entr(hits / hits.sum().clamp(min=1)).sum().exp()}

    def watch(self) -> dict[str, Tensor]:
        """`hits` so far, by cluster."""
        return {"hits": self.hits}

    @torch.no_grad()
    def _found(
        self,
        nouns: Float[Tensor, "nouns dim"],
        owner: Int64[Tensor, " nouns"],
        vectors: Float[Tensor, "batch clusters dim"],
        present: Bool[Tensor, "batch clusters"],
    ) -> Int64[Tensor, " clusters"]:
        """How many nouns take each cluster in their own picture; added to `hits`, of all processes."""
        cosine = torch.einsum("nd,nrd->nr", nouns, vectors[owner]).masked_fill(~present[owner], -torch.inf)
        found = summed(torch.bincount(cosine.argmax(dim=1), minlength=self.clusters))
        self.hits += found
        return found

    def noun_vectors(self, nouns: list[str]) -> Float[Tensor, "nouns dim"]:
        """Unit vectors of nouns, by CLIP's text side."""
        return self._nouns(self.clip, nouns).to(self.offsets.device)
