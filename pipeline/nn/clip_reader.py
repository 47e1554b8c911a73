"""A frozen CLIP as the harness's models use it, and a memory of what was computed from pictures.

Axes: tokens (patches, row-major), dim (of the joint space), texts, height/width in pixels.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from pipeline.interfaces import ClipEncoder
from pipeline.nn.visual_tower import renormalised

# Of remembered tensors: the windows of some thousand pictures.
MEMORY_BYTES = 256 << 20


class ClipReader:
    """The text half of a `ScoreModel`, and patches of ImageNet-normalised pixels."""

    def __init__(self, clip: ClipEncoder) -> None:
        self.clip = clip

    def encode_text(self, texts: list[str]) -> Float[Tensor, "texts dim"]:
        """Unit text vectors."""
        return self.clip.encode_text(texts)

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch dim"]:
        """Unit vectors of whole pictures."""
        return self.clip.encode_image(self.own_colours(pixels))

    def own_colours(self, pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
        """From ImageNet's normalisation, which the harness gives, to the encoder's own."""
        return renormalised(pixels, self.clip.mean, self.clip.std)

    def patches(self, pixels: Float[Tensor, "1 3 height width"]) -> Float[Tensor, "rows columns dim"]:
        """Unit vector of every patch."""
        return self.clip.encode_patches(self.own_colours(pixels))[0].float()


class Memory:
    """What was computed from the latest pictures, by their values, up to `limit` bytes.

    An evaluation shows every picture to a model once per background rule and once for its regions.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self._known: OrderedDict[bytes, tuple[Tensor, ...]] = OrderedDict()

    def recall(self, picture: Shaped[Tensor, "..."], compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """`compute()`, or what it gave for an equal picture."""
        key = fingerprint(picture)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        found = self._known[key] = compute()
        self.size += _bytes(found)
        while self.size > self.limit and len(self._known) > 1:
            self.size -= _bytes(self._known.popitem(last=False)[1])
        return found


def fingerprint(picture: Shaped[Tensor, "..."]) -> bytes:
    """sha256 of a tensor's shape and values."""
    values = picture.detach().cpu().contiguous()
    return hashlib.sha256(repr(tuple(values.shape)).encode() + values.numpy().tobytes()).digest()


def seed_of(picture: Shaped[Tensor, "..."]) -> int:
    """A 64-bit seed that depends on the values alone."""
    return int.from_bytes(fingerprint(picture)[:8], "little", signed=True)


def unit_rows(x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
    """Rows of length 1."""
    return torch.nn.functional.normalize(x.float(), dim=-1)


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
