"""A CLIP whose patches are gathered without learning: cluster the patch tokens, average, name the averages.

Axes: tokens (patches, row-major), dim (of the joint space), groups, rows x columns (patch grid), pixels.

Source: GroupViT 4.4 and Table 4 (zero-shot baselines); SCG card section 12 for what it leaves open: tokens after the
final norm and projection at unit length, their mean per group at unit length, the image as the mean of its tokens.
"""

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.interfaces import ClipEncoder
from pipeline.nn.clip_reader import ClipReader, unit_rows
from pipeline.nn.group_reader import GroupReader, GroupReading
from pipeline.nn.reading import seed_of
from pipeline.nn.token_groups import group_means, in_reading_order

# Unit tokens of one window and a seed that depends on its pixels alone; any integer ids.
Cluster = Callable[[Float[Tensor, "tokens dim"], int], Int64[Tensor, " tokens"]]


class GroupedClip(GroupReader, ClipReader):
    """A `GroupModel`, scored by GroupViT's own rule."""

    def __init__(self, clip: ClipEncoder, cluster: Cluster) -> None:
        super().__init__(clip)
        self.cluster = cluster

    @property
    def logit_scale(self) -> float:
        """The CLIP's own."""
        return self.clip.logit_scale

    def _read(self, pixels: Float[Tensor, "windows 3 height width"]) -> list[GroupReading]:
        """Mean patch of every group and of the window, and each patch in one group."""
        found = []
        for window, patches in zip(pixels.split(1), self.patches(pixels), strict=True):
            tokens = patches.flatten(0, 1)
            labels = in_reading_order(self.cluster(tokens, seed_of(window)))
            vectors, image = unit_rows(group_means(tokens, labels)), unit_rows(tokens.mean(0, keepdim=True))[0]
            found.append((vectors, image, F.one_hot(labels).T.float().unflatten(1, patches.shape[:2])))
        return found
