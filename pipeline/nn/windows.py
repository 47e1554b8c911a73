"""The answers for a canvas's overlapping windows as one score map of the image.

Scores are upsampled to their window, averaged on the canvas and resized to the image (bilinear, half-pixel centres), a
few channels at a time, so that a thousand classes need no more memory than eighty.

Axes: channels, height and width in pixels; grid_h and grid_w = a model's own score resolution; groups.

Source: evaluation card section 5; GroupViT's released evaluation code.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from pipeline.nn.group_scores import GroupScores, hard_groups

SCORES_AT_ONCE = 2**24  # float32 scores held at image size (64 MiB)
NEVER = -1.0  # what `kept_threshold` answers for a pixel that is background at every threshold


@dataclass(frozen=True, slots=True)
class GridScores:
    """Scores by cell of the model's grid."""

    scores: Float[Tensor, "channels grid_h grid_w"]

    def told(self) -> Bool[Tensor, " channels"]:
        """Which channels have a score other than 0."""
        return (self.scores != 0).flatten(1).any(1)

    def take(self, channels: Int64[Tensor, " kept"]) -> "GridScores":
        """Those channels alone."""
        return GridScores(self.scores[channels])

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def device(self) -> torch.device:
        """Where the scores are."""
        return self.scores.device

    def channels(self, start: int, stop: int, size: tuple[int, int]) -> Float[Tensor, "part height width"]:
        """Some channels at `size`."""
        return upsample(self.scores[start:stop].float(), size)


@dataclass(frozen=True, slots=True)
class GroupTable:
    """Scores by group, and the group of each pixel, at the size that the model saw."""

    table: Float[Tensor, "channels groups"]
    owner: Int64[Tensor, "height width"]

    def told(self) -> Bool[Tensor, " channels"]:
        """Which channels have a score other than 0."""
        return (self.table != 0).any(1)

    def take(self, channels: Int64[Tensor, " kept"]) -> "GroupTable":
        """Those channels alone."""
        return GroupTable(self.table[channels], self.owner)

    def __len__(self) -> int:
        return len(self.table)

    @property
    def device(self) -> torch.device:
        """Where the scores are."""
        return self.table.device

    def channels(self, start: int, stop: int, size: tuple[int, int]) -> Float[Tensor, "part height width"]:
        """Some channels; `size` is the owners' own."""
        return self.table[start:stop].index_select(1, self.owner.flatten()).view(-1, *size)


def group_table(scores: GroupScores, size: tuple[int, int]) -> GroupTable:
    """A window's class scores by group, for pixels at `size`."""
    return GroupTable(scores.confidence.float().T, hard_groups(scores.maps, size))


@dataclass(frozen=True, slots=True)
class Window:
    """Where a window lies on the canvas, the padded size that the model saw, and its answer."""

    top: int
    left: int
    height: int
    width: int
    padded: tuple[int, int]
    scores: GridScores | GroupTable


def upsample(scores: Float[Tensor, "channels h w"], size: tuple[int, int]) -> Float[Tensor, "channels H W"]:
    """Bilinear, half-pixel centres."""
    if scores.shape[1:] == size:
        return scores
    return F.interpolate(scores[None], size, mode="bilinear", align_corners=False)[0]


def image_scores(
    windows: Sequence[Window], canvas: tuple[int, int], size: tuple[int, int]
) -> Iterator[Float[Tensor, "part height width"]]:
    """The averaged scores at `size`, channels in order, a part at a time."""
    channels, device = len(windows[0].scores), windows[0].scores.device
    count = torch.zeros(canvas, device=device)
    for window in windows:
        count[window.top : window.top + window.height, window.left : window.left + window.width] += 1
    part = max(1, SCORES_AT_ONCE // max(canvas[0] * canvas[1], size[0] * size[1]))
    for start in range(0, channels, part):
        stop = min(start + part, channels)
        if len(windows) == 1:
            scores = windows[0].scores.channels(start, stop, windows[0].padded)
            yield upsample(scores[:, : canvas[0], : canvas[1]], size)
            continue
        total = torch.zeros(stop - start, *canvas, device=device)
        for window in windows:
            scores = window.scores.channels(start, stop, window.padded)
            rows = slice(window.top, window.top + window.height)
            total[:, rows, window.left : window.left + window.width] += scores[:, : window.height, : window.width]
        yield upsample(total / count, size)


def best_channel(
    windows: Sequence[Window], canvas: tuple[int, int], size: tuple[int, int]
) -> tuple[Float[Tensor, "height width"], Int64[Tensor, "height width"]]:
    """Best score and its channel at `size`; of equal scores the lowest channel wins.

    A channel that is 0 in every window stays 0, so that only the lowest of these can win. Rules that look at a few
    likely classes leave many: of 171 words and three windows fifteen tell anything (`nn.group_scores`).
    """
    told = torch.stack([window.scores.told() for window in windows]).any(0)
    told[(~told).nonzero()[:1, 0]] = True
    channels = told.nonzero()[:, 0]
    if len(channels) < len(told):
        windows = [replace(window, scores=window.scores.take(channels)) for window in windows]
    best, winner, start = torch.empty(0), torch.empty(0), 0
    for scores in image_scores(windows, canvas, size):
        value, channel = scores.max(0)
        if not start:
            best, winner = value, channel
        else:
            better = value > best
            best, winner = torch.where(better, value, best), torch.where(better, channel + start, winner)
        start += len(scores)
    return best, channels[winner]


def background_table(
    confidence: Float[Tensor, "groups classes"], thresholds: Float[Tensor, " thresholds"]
) -> Float[Tensor, "thresholds groups"]:
    """A window's background score of each group: 1 where its best confidence lies below the threshold, else 0.

    The threshold is at most the window's highest confidence, so that its surest group is foreground at any threshold,
    even if that group owns no pixel.

    Source: GroupViT card section 9 step 6.
    """
    caps = thresholds.clamp(max=confidence.max())
    return (confidence.max(1).values < caps[:, None]).float()


def kept_threshold(
    best: Float[Tensor, "height width"],
    windows: Sequence[Window],
    thresholds: Float[Tensor, " thresholds"],
    canvas: tuple[int, int],
    size: tuple[int, int],
) -> Float[Tensor, "height width"]:
    """The highest threshold at which a pixel stays foreground: its best class score beats the background score.

    `windows` answer with `GroupTable`s of class scores. Background scores are averaged and resized as class scores are,
    for each of `thresholds` (ascending) on their own: 0 and 1 of different windows mix where they overlap. They grow
    with the threshold, so that one number per pixel says what happens at all of them; `NEVER` where the pixel is
    background at each. Of equal scores background wins, being the first channel in the released code.

    Source: GroupViT card section 9 steps 6 and 7.
    """
    backgrounds = []
    for window in windows:
        assert isinstance(window.scores, GroupTable)
        table = background_table(window.scores.table.T, thresholds)
        scores = GroupTable(table, window.scores.owner)
        backgrounds.append(Window(window.top, window.left, window.height, window.width, window.padded, scores))
    kept = torch.zeros_like(best, dtype=torch.int64)
    for background in image_scores(backgrounds, canvas, size):
        kept += (best > background).sum(0)
    return torch.cat([thresholds.new_full((1,), NEVER), thresholds])[kept]
