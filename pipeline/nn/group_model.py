"""Trained models that segment by groups: the vectors of images and segments, and the sizes of the groups.

Axes: batch, groups (segments of the last stage), tokens (patches), dim; windows, height and width in pixels.
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from pipeline.nn.group_reader import GroupReader, GroupReading
from pipeline.nn.grouping import Grouped, GroupingEncoder
from pipeline.nn.projector import Projector
from pipeline.nn.reading import ReadingModule


class GroupModel(GroupReader, ReadingModule):
    """A `GroupReader` with weights of its own. Its `loss` sets `sizes`, the share of tokens in each group."""

    sizes: Float[Tensor, "batch groups"]

    def watch(self) -> dict[str, Tensor]:
        """`group_sizes`: share of the last batch's tokens in each group."""
        return {"group_sizes": self.sizes.mean(dim=0)}


class ProjectedGroups(GroupModel):
    """A grouping encoder, and the projector of its segments and of their mean, the image's vector."""

    image: GroupingEncoder
    image_projector: Projector

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit vector of the whole image."""
        return self.image_vectors(self.image(pixels))

    def image_vectors(self, grouped: Grouped) -> Float[Tensor, "batch dim"]:
        """Unit vectors of images that the encoder has seen."""
        return F.normalize(self.image_projector(grouped.segments.mean(dim=1)).float(), dim=-1)

    def _read(self, pixels: Float[Tensor, "windows 3 height width"]) -> list[GroupReading]:
        """Segments' and images' vectors, from the assignment as trained, and the segments' soft maps.

        The projector may have seen mean segments alone in training; its BatchNorm uses their statistics here.
        Source: cards groupvit.md section 9, steps 1-5, and ovsegmentor.md section 6.
        """
        grouped = self.image(pixels)
        segments = F.normalize(self.image_projector(grouped.segments).float(), dim=-1)
        maps = grouped.soft_maps().unflatten(2, self.image.grid(pixels))
        return list(zip(segments, self.image_vectors(grouped), maps, strict=True))
