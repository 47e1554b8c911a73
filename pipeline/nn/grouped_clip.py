"""A CLIP whose patches are gathered without learning: cluster the patch tokens, average, name the averages.

Axes: tokens (patches, row-major), dim (of the joint space), groups, classes, rows x columns (patch grid), height/width
in pixels.

Source: GroupViT 4.2 and Table 4 (zero-shot baselines); SCG card section 12 for what it leaves open: tokens after the
final norm and projection at unit length, their mean per group at unit length, the image as the mean of its tokens.
"""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.interfaces import ClipEncoder
from pipeline.nn.clip_reader import MEMORY_BYTES, ClipReader, Memory, seed_of, unit_rows
from pipeline.nn.group_scores import GroupScores, group_confidence, hard_groups, paint
from pipeline.nn.token_groups import group_means, in_reading_order

# Unit tokens of one window and a seed that depends on its pixels alone; any integer ids.
Cluster = Callable[[Float[Tensor, "tokens dim"], int], Int64[Tensor, " tokens"]]


class GroupedClip(ClipReader):
    """A `GroupModel`, scored by GroupViT's own rule. Groups of a window are computed once."""

    def __init__(self, clip: ClipEncoder, cluster: Cluster) -> None:
        super().__init__(clip)
        self.cluster, self.memory = cluster, Memory(MEMORY_BYTES)

    def groups(
        self, pixels: Float[Tensor, "1 3 height width"], class_embeddings: Float[Tensor, "classes dim"]
    ) -> GroupScores:
        """Confidence of every group, and its patches."""
        labels, vectors, image = self.memory.recall(pixels, lambda: self._groups(pixels))
        confidence = group_confidence(vectors, image, class_embeddings, self.clip.logit_scale)
        return GroupScores(confidence, _maps(labels))

    def segment(
        self, pixels: Float[Tensor, "1 3 height width"], class_embeddings: Float[Tensor, "classes dim"]
    ) -> Float[Tensor, "classes height width"]:
        """Class scores in [0, 1] per pixel: those of the group it belongs to."""
        return paint(self.groups(pixels, class_embeddings), (pixels.shape[2], pixels.shape[3]))

    def regions(self, pixels: Float[Tensor, "1 3 height width"]) -> Int64[Tensor, "height width"]:
        """The group of each pixel."""
        labels, _, _ = self.memory.recall(pixels, lambda: self._groups(pixels))
        return hard_groups(_maps(labels), (pixels.shape[2], pixels.shape[3]))

    def _groups(
        self, pixels: Float[Tensor, "1 3 height width"]
    ) -> tuple[Int64[Tensor, "rows columns"], Float[Tensor, "groups dim"], Float[Tensor, " dim"]]:
        patches = self.patches(pixels)
        tokens = patches.flatten(0, 1)
        labels = in_reading_order(self.cluster(tokens, seed_of(pixels)))
        vectors, image = unit_rows(group_means(tokens, labels)), unit_rows(tokens.mean(0, keepdim=True))[0]
        return labels.view(patches.shape[:2]), vectors, image


def _maps(labels: Int64[Tensor, "rows columns"]) -> Float[Tensor, "groups rows columns"]:
    return F.one_hot(labels).permute(2, 0, 1).float()
