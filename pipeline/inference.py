"""From an image to class scores: resize, windows, averaging, final resize, background.

The harness owns everything but the model's answer for one window, so every model is scored the same way. Class scores
are averaged over windows (never labels) and resized to the label map's size before the best class is taken
(`pipeline.nn.windows`).

Axes: classes (channels asked for), height and width in pixels; canvas = the resized image, window = a crop of it,
grid_h and grid_w = the model's own score resolution. Scores lie in [0, 1].

Source: evaluation card sections 1, 4 and 5; GroupViT's released evaluation code.
Deviates: there, an image that is made smaller is resized without a low-pass filter (OpenCV). `antialias: false` does
that; tiny models that see photographs at a fraction of their size need `antialias: true`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from pipeline.interfaces import IMAGENET_MEAN, IMAGENET_STD
from pipeline.nn.group_scores import GroupScores
from pipeline.nn.pamr import refine
from pipeline.nn.reading import WindowReader
from pipeline.nn.windows import GridScores, GroupTable, Window, best_channel, group_table, kept_threshold
from pipeline.params import ParamsError, Range
from pipeline.text.prompts import class_prompts

PromptOrder = Literal["average_first", "normalise_first"]
TEXT_BATCH = 256  # prompts per call of the text tower
PIXELS_AT_ONCE = 1 << 22  # of a forward pass: 20 windows of 448 px


@runtime_checkable
class ScoreModel(Protocol):
    """What the harness asks of a model; pixels are ImageNet-normalised.

    A model may also have `regions(pixels)`, its hard masks; `project_text(texts)`, text vectors before their
    normalisation; `multiple`, of which the sides of a window must be whole numbers, pixels; and `one_softmax`, True
    where the scores of a cell are one softmax over the words' logits, each of them a cosine times a constant. How two
    words compare then does not depend on the others.
    """

    def encode_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]: ...

    def segment(
        self, pixels: Float[Tensor, "1 3 height width"], class_embeddings: Float[Tensor, "classes dim"]
    ) -> Float[Tensor, "classes grid_h grid_w"]: ...


@runtime_checkable
class GroupModel(ScoreModel, Protocol):
    """A model that segments by groups, for the background rule that compares them; `segment` paints the same scores."""

    def groups(
        self, pixels: Float[Tensor, "1 3 height width"], class_embeddings: Float[Tensor, "classes dim"]
    ) -> GroupScores: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """How an image reaches the model; lengths in pixels.

    Attributes:
        short_side: of the canvas, aspect kept; None leaves the stored size.
        long_side: upper bound of the canvas's longer side.
        window: side of the sliding window; None shows the whole canvas at once.
        stride: between windows.
        multiple: windows are padded at the right and bottom to multiples of this, the scores cropped back.
        antialias: low-pass filter when the image becomes smaller.
    """

    short_side: Annotated[int, Range(1)] | None
    long_side: Annotated[int, Range(1)]
    window: Annotated[int, Range(1)] | None
    stride: Annotated[int, Range(1)]
    multiple: Annotated[int, Range(1)]
    antialias: bool

    def __post_init__(self) -> None:
        if self.window is not None and self.stride > self.window:
            raise ParamsError(f"evaluate.geometry.stride: {self.stride} leaves gaps between windows of {self.window}")

    def canvas(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the resized image; at least one pixel each."""
        if self.short_side is None:
            return height, width
        factor = min(self.long_side / max(height, width), self.short_side / min(height, width))
        return max(1, int(height * factor + 0.5)), max(1, int(width * factor + 0.5))

    @property
    def square(self) -> int | None:
        """Side to which the whole image is squashed where a model sees all of it; None leaves the stored size."""
        return self.window or self.short_side

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """The next multiples of `multiple`."""
        return height + -height % self.multiple, width + -width % self.multiple

    def fitting(self, model: object) -> "Geometry":
        """The same, with windows that the model can take: padded to whole numbers of its patches, too."""
        return replace(self, multiple=math.lcm(self.multiple, getattr(model, "multiple", 1)))

    def described(self) -> dict[str, dict[str, Any]]:
        """Resize and window, as reports hold them."""
        resize = {"antialias": self.antialias, "long_side": self.long_side, "short_side": self.short_side}
        return {"resize": resize, "window": {"multiple": self.multiple, "side": self.window, "stride": self.stride}}

    def windows(self, height: int, width: int) -> Iterator[tuple[int, int, int, int]]:
        """Top, left, height and width of each window of a canvas, row by row; the last ones end at the border."""
        for top, tall in self._spans(height):
            for left, wide in self._spans(width):
                yield top, left, tall, wide

    def _spans(self, length: int) -> list[tuple[int, int]]:
        if self.window is None or length <= self.window:
            return [(0, length)]
        count = (length - self.window + self.stride - 1) // self.stride + 1
        return [(min(index * self.stride, length - self.window), self.window) for index in range(count)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Background:
    """A rule for pixels that are no class.

    Attributes:
        stuff_words: the model is also asked for the benchmark's stuff words; where one wins, there is background.
        thresholded: a pixel whose best score is below the threshold is background; the threshold can be swept.
        by_group: the threshold is applied to the groups of each window, before windows are averaged: a background
            channel with scores of its own beside the classes. Needs a `GroupModel`.
        against_zero: each class is scored alone, against a constant: the sigmoid of its logit (`single_scores`). Needs
            a model of `one_softmax`.
    """

    stuff_words: bool
    thresholded: bool
    by_group: bool = False
    against_zero: bool = False


# Source: evaluation card section 6. "group_threshold": the released code of GroupViT and OVSegmentor, and ZeroSeg that
# follows it. "max_probability": S-Seg. "extra_vocabulary": SCG. "constant_logit": TCL (section 9), for models that have
# one logit per word and cell. "none": answers foreground classes everywhere, for benchmarks without a background class.
BACKGROUNDS = {
    "group_threshold": Background(stuff_words=False, thresholded=True, by_group=True),
    "max_probability": Background(stuff_words=False, thresholded=True),
    "constant_logit": Background(stuff_words=False, thresholded=True, against_zero=True),
    "extra_vocabulary": Background(stuff_words=True, thresholded=False),
    "extra_vocabulary_threshold": Background(stuff_words=True, thresholded=True),
    "none": Background(stuff_words=False, thresholded=False),
}
BackgroundName = Literal[
    "group_threshold",
    "max_probability",
    "constant_logit",
    "extra_vocabulary",
    "extra_vocabulary_threshold",
    "none",
]
# Of "constant_logit". Source: TCL's sigmoid starts as that of 10 times the cosine less 2.5; CLIP's softmax has 100
# times the cosine, at which a sigmoid is 0 or 1. Deviates: TCL learns both numbers.
SINGLE_SHARE, SINGLE_BIAS = 0.1, -2.5


@torch.inference_mode()
def class_embeddings(
    model: ScoreModel, names: Sequence[str], templates: Sequence[str], order: PromptOrder
) -> tuple[Float[Tensor, "classes dim"], PromptOrder]:
    """Unit vectors of the classes, and the order that was really used.

    "average_first": the mean of un-normalised text vectors over templates, then one normalisation. "normalise_first":
    each vector is normalised before the mean too. A model without `project_text` gives unit vectors only, so that its
    order is the latter; with one template the two are the same.

    Source: evaluation card section 4.
    """
    texts = [text for prompts in class_prompts(names, templates) for text in prompts]
    project = getattr(model, "project_text", None)
    if order == "average_first" and project is None and len(templates) > 1:
        order = "normalise_first"
    encode = project if order == "average_first" and project is not None else model.encode_text
    vectors = torch.cat([encode(texts[i : i + TEXT_BATCH]).float() for i in range(0, len(texts), TEXT_BATCH)])
    if order == "normalise_first":
        vectors = F.normalize(vectors, dim=1)
    return F.normalize(vectors.view(len(names), len(templates), -1).mean(1), dim=1), order


def resize_image(
    image: UInt8[np.ndarray, "height width 3"], size: tuple[int, int], antialias: bool
) -> UInt8[np.ndarray, "new_height new_width 3"]:
    """Bilinear resize to (height, width); without `antialias` exactly OpenCV's."""
    if image.shape[:2] == size:
        return image
    if not antialias:
        import cv2

        return cv2.resize(image, (size[1], size[0]), interpolation=cv2.INTER_LINEAR)
    pixels = torch.tensor(image).permute(2, 0, 1)[None].float()
    resized = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)[0]
    return resized.round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()


def normalise(image: UInt8[np.ndarray, "height width 3"], device: str) -> Float[Tensor, "1 3 height width"]:
    """RGB bytes to ImageNet-normalised pixels."""
    pixels = torch.tensor(image).to(device).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def pad(pixels: Float[Tensor, "1 3 height width"], size: tuple[int, int]) -> Float[Tensor, "1 3 padded_h padded_w"]:
    """Normalised pixels with the mean colour, which is zero, to their right and below them."""
    below, right = size[0] - pixels.shape[2], size[1] - pixels.shape[3]
    return F.pad(pixels, (0, right, 0, below)) if below or right else pixels


def single_scores(scores: Float[Tensor, "words_and_zero height width"]) -> Float[Tensor, "words height width"]:
    """Of a softmax over words and, last, a word whose logit is 0 everywhere, the sigmoid of each word's logit + bias.

    p_word / (p_word + p_zero / e^b) = e^(l + b) / (e^(l + b) + 1): the other words cancel, so that the level of the
    score does not depend on how many there are, and one constant serves every vocabulary. 0 where a word has no
    probability. They do not cancel in a mixture of softmaxes, nor where the zero word can be left out.

    Source: evaluation card section 9 (TCL's masks are such sigmoids, background is a constant among them).
    """
    words, zero = scores[:-1], scores[-1:]
    return torch.where(words > 0, words / (words + zero * math.exp(-SINGLE_BIAS)), 0)


class Answered(NamedTuple):
    """Per pixel: the best class's score, [0, 1]; what `threshold_labels` compares; the label id."""

    best: Float[Tensor, "height width"]
    compared: Float[Tensor, "height width"]
    label_ids: Int64[Tensor, "height width"]


class Segmenter:
    """A model that knows its class list, applied to whole images.

    `thresholds` are the only ones that may be asked of a rule by group, ascending; other rules take any. `pamr` refines
    the scores of each window (`nn.pamr`).

    Raises:
        ValueError: a background rule on a benchmark without background.
        ParamsError: a rule by group for a model without groups, or with `pamr`, which needs score maps; a constant
            logit for a model that is not of `one_softmax`: by groups, a mixture, refined; one word alone under a rule
            that compares words, where it is sure everywhere.
    """

    def __init__(
        self,
        model: ScoreModel,
        embeddings: Float[Tensor, "channels dim"],
        *,
        num_foreground: int,
        has_background: bool,
        geometry: Geometry,
        background: Background,
        device: str,
        thresholds: Sequence[float] = (),
        pamr: bool = False,
    ) -> None:
        if not has_background and (background.stuff_words or background.thresholded):
            raise ValueError("this benchmark has no background class: use background: none")
        if background.by_group and not isinstance(model, GroupModel):
            raise ParamsError(f"background group_threshold: {type(model).__name__} has no groups; choose another rule")
        if background.against_zero and not getattr(model, "one_softmax", False):
            problem = "scores a word by more than its own logit (groups, a mixture, a refinement)"
            raise ParamsError(f"background constant_logit: {type(model).__name__} {problem}; choose another rule")
        if background.by_group and pamr:
            raise ParamsError("pamr: background group_threshold has no score maps to refine; choose another rule")
        if background.by_group and (not thresholds or sorted(set(thresholds)) != list(thresholds)):
            raise ValueError(f"thresholds: a rule by group needs different ones, ascending, found {thresholds}")
        if background.thresholded and not background.against_zero and len(embeddings) == 1:
            raise ParamsError(
                "one word alone has the probability 1 everywhere, and nothing is background: "
                "name another word, stuff words with the rule extra_vocabulary, or the rule constant_logit or none"
            )
        self.model, self.embeddings, self.geometry = model, embeddings, geometry.fitting(model)
        self.background, self.device, self.pamr = background, device, pamr
        self.thresholds = torch.tensor(thresholds, dtype=torch.float32, device=device)
        # Label id of each channel: foreground classes in order, then background for every stuff word.
        ids = torch.arange(num_foreground) + int(has_background)
        stuff = torch.zeros(len(embeddings) - num_foreground, dtype=torch.int64)
        self.label_ids = torch.cat([ids, stuff]).to(device)
        if background.against_zero:  # a word of length 0 has cosine 0, and so the logit 0, with everything
            self.embeddings = torch.cat([SINGLE_SHARE * embeddings, torch.zeros_like(embeddings[:1])])

    def __call__(
        self, image: UInt8[np.ndarray, "height width 3"]
    ) -> tuple[Float[Tensor, "height width"], Int64[Tensor, "height width"]]:
        """Per pixel of the image the score that `threshold_labels` compares, and the label id it stands for.

        The score is that of the best class; for a rule by group the highest of `thresholds` at which the pixel is not
        background, below all of them where there is none.
        """
        return next(self.many([image]))

    def with_scores(self, image: UInt8[np.ndarray, "height width 3"]) -> Answered:
        """`__call__`, with the best class's score under every rule."""
        return next(self._answers([image]))

    def many(
        self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]
    ) -> Iterator[tuple[Float[Tensor, "_ _"], Int64[Tensor, "_ _"]]]:
        """`__call__` of every image in order; a `WindowReader` reads their windows of equal size together.

        So many images are held resized and read before they are answered for as one forward pass sees
        (`PIXELS_AT_ONCE`). What else that sees rounds an answer, as little as a float does.
        """
        return ((found.compared, found.label_ids) for found in self._answers(images))

    def _answers(self, images: Sequence[UInt8[np.ndarray, "_ _ 3"]]) -> Iterator[Answered]:
        held: list[tuple[tuple[int, int], Tensor]] = []
        for number, image in enumerate(images, start=1):
            held.append((image.shape[:2], self._canvas(image)))
            if number == len(images) or sum(pixels[0, 0].numel() for _, pixels in held) >= PIXELS_AT_ONCE:
                self._read_ahead([pixels for _, pixels in held])
                yield from (self._answer(pixels, size) for size, pixels in held)
                held = []

    @torch.inference_mode()
    def _read_ahead(self, canvases: list[Float[Tensor, "1 3 _ _"]]) -> None:
        if isinstance(self.model, WindowReader):
            crops = [crop for pixels in canvases for _, crop in self._crops(pixels)]
            for batch in same_size(crops, PIXELS_AT_ONCE):
                self.model.read(torch.cat([crops[index] for index in batch]))

    @torch.inference_mode()
    def _answer(self, pixels: Float[Tensor, "1 3 canvas_h canvas_w"], size: tuple[int, int]) -> Answered:
        canvas = (pixels.shape[2], pixels.shape[3])
        windows = [
            Window(top, left, height, width, (crop.shape[2], crop.shape[3]), self._scores(crop))
            for (top, left, height, width), crop in self._crops(pixels)
        ]
        best, channel = best_channel(windows, canvas, size)
        if not torch.isfinite(best).all():
            raise ValueError("the model gave scores that are not finite")
        compared = best
        if self.background.by_group:
            compared = kept_threshold(best, windows, self.thresholds, canvas, size)
        return Answered(best, compared, self.label_ids[channel])

    def _canvas(self, image: UInt8[np.ndarray, "height width 3"]) -> Float[Tensor, "1 3 canvas_h canvas_w"]:
        canvas = self.geometry.canvas(*image.shape[:2])
        return normalise(resize_image(image, canvas, self.geometry.antialias), self.device)

    def _crops(
        self, pixels: Float[Tensor, "1 3 canvas_h canvas_w"]
    ) -> Iterator[tuple[tuple[int, int, int, int], Float[Tensor, "1 3 padded_h padded_w"]]]:
        """Each window's place, and what the model sees of it."""
        for top, left, height, width in self.geometry.windows(pixels.shape[2], pixels.shape[3]):
            crop = pixels[:, :, top : top + height, left : left + width]
            yield (top, left, height, width), pad(crop, self.geometry.padded(height, width))

    def _scores(self, crop: Float[Tensor, "1 3 height width"]) -> GridScores | GroupTable:
        if self.background.by_group and isinstance(self.model, GroupModel):
            return group_table(self.model.groups(crop, self.embeddings), (crop.shape[2], crop.shape[3]))
        scores = self.model.segment(crop, self.embeddings)
        if self.background.against_zero:
            scores = single_scores(scores.float())
        return GridScores(refine(crop, scores) if self.pamr else scores)


def threshold_labels(
    best: Float[Tensor, "height width"], label_ids: Int64[Tensor, "height width"], threshold: float | None
) -> Int64[Tensor, "height width"]:
    """Label ids with background (0) where the best score lies below the threshold; None keeps them all."""
    # The threshold is compared as float32, as `ThresholdSweep` does: in float64 a tie could fall differently.
    return label_ids if threshold is None else torch.where(best < torch.tensor(threshold), 0, label_ids)


def same_size(pictures: Sequence[Float[Tensor, "1 3 _ _"]], pixels: int) -> Iterator[list[int]]:
    """Indices of pictures of one size, in order, as many as have `pixels` pixels together, or one."""
    by_size: dict[torch.Size, list[int]] = {}
    for index, picture in enumerate(pictures):
        by_size.setdefault(picture.shape, []).append(index)
    for size, indices in by_size.items():
        step = max(1, pixels // size[2:].numel())
        yield from (indices[start : start + step] for start in range(0, len(indices), step))


def nearest(labels: Int64[Tensor, "grid_h grid_w"], size: tuple[int, ...]) -> Int64[Tensor, "height width"]:
    """A label map at another size, by nearest neighbour (pixel centres)."""
    return F.interpolate(labels[None, None].double(), tuple(size), mode="nearest-exact")[0, 0].long()
