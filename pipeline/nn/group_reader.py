"""A model that segments by groups: it reads vectors and maps of groups from a window, and names them by the words.

Axes: as `pipeline.nn.group_scores`; windows, height and width in pixels.
"""

from abc import abstractmethod
from collections.abc import Sequence

from jaxtyping import Float, Int64
from torch import Tensor

from pipeline.nn.group_scores import GroupScores, group_confidence, hard_groups, paint
from pipeline.nn.reading import WindowReader

# Unit vectors of the groups and of the window, in the space of the words; the groups' shares of the patches.
GroupReading = tuple[Float[Tensor, "groups dim"], Float[Tensor, " dim"], Float[Tensor, "groups rows columns"]]


class GroupReader(WindowReader):
    """`groups`, `segment` and `regions` of a model that reads groups."""

    @property
    @abstractmethod
    def logit_scale(self) -> float:
        """What cosines are multiplied with: the inverse temperature."""

    @abstractmethod
    def _read(self, pixels: Float[Tensor, "windows 3 height width"]) -> Sequence[GroupReading]: ...

    def groups(
        self, pixels: Float[Tensor, "1 3 height width"], class_embeddings: Float[Tensor, "classes dim"]
    ) -> GroupScores:
        """The classes of each group (among the image's five best), and where it lies."""
        vectors, image, maps = self.seen(pixels)
        return GroupScores(group_confidence(vectors, image, class_embeddings, self.logit_scale), maps)

    def segment(
        self, pixels: Float[Tensor, "1 3 height width"], class_embeddings: Float[Tensor, "classes dim"]
    ) -> Float[Tensor, "classes height width"]:
        """Class scores in [0, 1] per pixel: those of the group that owns it."""
        return paint(self.groups(pixels, class_embeddings), (pixels.shape[2], pixels.shape[3]))

    def regions(self, pixels: Float[Tensor, "1 3 height width"]) -> Int64[Tensor, "height width"]:
        """The group of each pixel."""
        return hard_groups(self.seen(pixels)[2], (pixels.shape[2], pixels.shape[3]))
